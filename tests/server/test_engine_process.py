"""The engine in a process of its own: as `LLM` in what it answers."""

import asyncio
import time

import pytest
from engine_process import LONG, PROMPT, SHORT, all_of, idle, last_of, until
from ingot import LLM, SamplingParams
from ingot.engines.errors import RequestError
from ingot.runtime.server.channel import options
from ingot.runtime.server.engine import EngineProcess


@pytest.fixture(scope="module")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(runner, demo_engine_fp32):
    engine = EngineProcess(demo_engine_fp32)
    runner.run(engine.start())
    yield engine
    runner.run(engine.close())


@pytest.fixture(scope="module")
def llm(demo_engine_fp32):
    with LLM(demo_engine_fp32) as llm:
        yield llm


# -- as LLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SHORT,
        SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=5, max_tokens=15),
        SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=8),
        SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2),
        SamplingParams(temperature=0, max_tokens=40, stop=["return", "\n\n"], ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=10, min_tokens=2, stop_token_ids=[202], logit_bias={202: 5.0}),
        SamplingParams(temperature=0, max_tokens=2**31 - 1, stop_token_ids=range(4096)),
        None,
    ],
    ids=["greedy", "sampled", "n", "logprobs", "stop", "biased", "wide", "default"],
)
def test_answers_are_those_of_llm(runner, engine, llm, params):
    for prompt in (PROMPT, [5, 6, 7, 8], {"prompt": "import os\n"}):
        if params is None:
            params = SamplingParams(**{**options(engine.default_params()), "seed": 3})
            assert engine.default_params() == llm.default_params()
        (expected,) = llm.generate(prompt, params, progress=False)
        found = runner.run(last_of(engine, prompt, params))
        assert found.prompt == expected.prompt and found.finished
        assert list(found.prompt_token_ids) == list(expected.prompt_token_ids)
        for ours, theirs in zip(found.outputs, expected.outputs, strict=True):
            assert ours.token_ids == theirs.token_ids and ours.text == theirs.text
            assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason)
            assert_same_scores(ours.logprobs, theirs.logprobs)
            assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)
        assert_same_scores(found.prompt_logprobs, expected.prompt_logprobs)
        times = found.metrics
        assert times.arrival <= times.first_scheduled <= times.first_token <= times.finished <= time.monotonic()


def assert_same_scores(found, expected):
    assert (found is None) == (expected is None)
    for ours, theirs in zip(found or [], expected or [], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert {t: (s.rank, s.decoded_token) for t, s in ours.items()} == {
                t: (s.rank, s.decoded_token) for t, s in theirs.items()
            }
            assert [s.logprob for s in ours.values()] == pytest.approx([s.logprob for s in theirs.values()], abs=1e-4)


def test_grammars_are_followed_and_called_off(runner, engine, llm):
    pytest.importorskip("llguidance")
    params = SamplingParams(temperature=0, max_tokens=30, structured_outputs={"choice": ["import os", "import re"]})

    async def main():
        found = await last_of(engine, PROMPT, params)
        digits = SamplingParams(max_tokens=1000, structured_outputs={"regex": "[0-9]{900}"})
        task = asyncio.create_task(last_of(engine, PROMPT, digits))
        await asyncio.sleep(0)  # submitted, and called off before or after it is compiled
        task.cancel()
        await until(lambda: idle(engine))
        with pytest.raises(RequestError):
            await last_of(engine, PROMPT, SamplingParams(structured_outputs={"regex": "("}))
        return found

    (expected,) = llm.generate(PROMPT, params, progress=False)
    assert runner.run(main()).outputs[0].text == expected.outputs[0].text


def test_what_is_known_of_the_engine(engine, llm):
    assert engine.vocab_size == llm.vocab_size and engine.max_model_len == llm.max_model_len
    assert engine.healthy and engine.text is not None and not engine.gave_up
    assert engine.num_kv_tokens > 0 and engine.max_num_seqs > 0 and engine.ready.target == "cpu"
    engine.check()


def test_deltas_add_up_while_streams_share_steps(runner, engine):
    async def main():
        prompts = [[5 + i, 6, 7] for i in range(12)]
        params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, logprobs=0)
        before = (await engine.measure()).steps
        streams = await asyncio.gather(*(all_of(engine, prompt, params, deltas=True) for prompt in prompts))
        steps = (await engine.measure()).steps - before
        wholes = [await last_of(engine, prompt, params) for prompt in prompts]
        return streams, wholes, steps

    streams, wholes, steps = runner.run(main())
    for parts, whole in zip(streams, wholes, strict=True):
        assert "".join(part.outputs[0].text for part in parts) == whole.outputs[0].text
        assert [t for part in parts for t in part.outputs[0].token_ids] == whole.outputs[0].token_ids
        assert sum(len(part.outputs[0].logprobs) for part in parts) == 25
        assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert steps < 12 * 25 / 2


def test_a_slow_consumer_sees_fewer_and_longer_outputs(runner, engine):
    async def main():
        sizes = []
        async for output in engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
                                            deltas=True):  # fmt: skip
            sizes.append(len(output.outputs[0].token_ids))
            while len(sizes) == 1 and (await engine.measure()).running:  # until the engine is through with it
                await asyncio.sleep(0.05)
        return sizes

    sizes = runner.run(main())
    assert sum(sizes) == 60 and len(sizes) <= 4


def test_leaving_and_cancelling_free_the_pages(runner, engine):
    async def main():
        aborted = (await engine.measure()).finished.get("abort", 0)
        stream = engine.generate(PROMPT, LONG)
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(last_of(engine, PROMPT, LONG))
        while (await engine.measure()).running != 1:
            pass
        task.cancel()
        outputs = []
        async for output in engine.generate(PROMPT, LONG, "mine"):
            outputs.append(output)
            if len(outputs) == 2:
                engine.cancel("mine")
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        engine.cancel("nobody")
        await until(
            lambda: engine.metrics().finished.get("abort", 0) == aborted + 3
        )  # of itself, the last snapshot too
        await until(lambda: idle(engine))

    runner.run(main())


@pytest.mark.parametrize(
    "prompt, params, how, words",
    [
        ("", SHORT, {}, "empty"),
        ([5] * 5000, SHORT, {}, "context holds"),
        ([5, 10**6], SHORT, {}, "token 1000000"),
        ("a \ud800", SHORT, {}, "not Unicode"),
        (PROMPT, "greedy", {}, "must be a SamplingParams"),
        (PROMPT, SamplingParams(stop="\ud800"), {}, "surrogates"),
        (PROMPT, SamplingParams(logit_bias={10**6: 1}), {}, "logit_bias names token"),
        (PROMPT, SHORT, {"priority": "high"}, "priority is 'high'"),
        (PROMPT, SHORT, {"priority": 2**80}, "priority"),
    ],
)
def test_bad_requests_get_llms_sentences(runner, engine, prompt, params, how, words):
    with pytest.raises(RequestError, match=words):
        runner.run(all_of(engine, prompt, params, **how))


def test_an_id_is_used_once_at_a_time(runner, engine):
    async def main():
        stream = engine.generate(PROMPT, LONG, "same")
        await anext(stream)
        with pytest.raises(RequestError, match="in use"):
            await last_of(engine, PROMPT, SHORT, "same")
        await stream.aclose()
        assert (await last_of(engine, PROMPT, SHORT, "same")).finished

    runner.run(main())


def test_what_the_engine_process_refuses_is_a_request_error(runner, engine, monkeypatch):
    monkeypatch.setattr(SamplingParams, "check_vocabulary", lambda self, size: None)  # in this process
    with pytest.raises(RequestError, match="stop_token_ids names token 1000000"):
        runner.run(last_of(engine, PROMPT, SamplingParams(stop_token_ids=[10**6])))


# -- faults ------------------------------------------------------------------------------------------------------------
