"""The engine in a process of its own: as `LLM` in what it answers, and replaced when it is killed, hangs or breaks."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from ingot import LLM, SamplingParams
from ingot.engines.errors import EngineError, RequestError
from ingot.runtime.server import child
from ingot.runtime.server.channel import Failed, Frames, FromEngine, News, Ping, Pong, Ready, Submit, frame, options
from ingot.runtime.server.engine import EngineProcess

LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = "def main():\n"


async def all_of(engine, prompt, params=SHORT, request_id=None, **how):
    return [output async for output in engine.generate(prompt, params, request_id, **how)]


async def last_of(engine, prompt, params=SHORT, request_id=None):
    return (await all_of(engine, prompt, params, request_id))[-1]


async def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.02)


def idle(engine):
    metrics = engine.metrics()
    return metrics.running == 0 and metrics.waiting == 0 and metrics.kv_utilisation == 0


def alive(pid):
    """Neither gone nor dead and waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def cpu_seconds(pid):
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
            await asyncio.sleep(0.2)
        return sizes

    sizes = runner.run(main())
    assert sum(sizes) == 60 and len(sizes) < 30


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


def test_killed_and_stopped_engines_are_replaced(demo_engine_fp32):
    sampled = SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)

    async def strike(engine, blow, words, expected):
        pid, restarts = engine.pid, engine.restarts
        streaming = engine.generate(PROMPT, LONG, deltas=True)
        await anext(streaming)
        waiting = asyncio.create_task(last_of(engine, PROMPT, sampled))  # there is one row: nothing comes of it yet
        await asyncio.sleep(0.1)
        os.kill(pid, blow)
        with pytest.raises(EngineError, match=words):
            async for _ in streaming:
                pass
        assert not engine.healthy and not engine.metrics().healthy
        with pytest.raises(EngineError, match=words):
            engine.check()
        newcomer = asyncio.create_task(last_of(engine, PROMPT, sampled))  # it waits for the new process
        for answer in (await waiting, await newcomer):
            assert answer.outputs[0].token_ids == expected
        assert engine.healthy and engine.pid != pid and not alive(pid) and engine.restarts == restarts + 1
        await until(lambda: idle(engine))

    async def main():
        async with EngineProcess(demo_engine_fp32, watchdog=2.0, max_num_seqs=1) as engine:
            expected = (await last_of(engine, PROMPT, sampled)).outputs[0].token_ids
            await strike(engine, signal.SIGKILL, "killed by SIGKILL; it is being restarted", expected)
            await strike(engine, signal.SIGSTOP, "did not answer for 2 s and was killed", expected)
            os.kill(engine.pid, signal.SIGTERM)  # meant for the API process, which may still drain
            assert (await last_of(engine, PROMPT, sampled)).outputs[0].token_ids == expected
            last = engine.pid
            task = asyncio.create_task(last_of(engine, PROMPT, LONG))
            await until(lambda: engine.metrics().running == 1)
            begun = time.monotonic()
            await asyncio.gather(engine.close(), engine.close())
            assert time.monotonic() - begun < 8 and not alive(last)
            assert (await task).outputs[0].finish_reason == "abort"
            with pytest.raises(EngineError, match="closed"):
                await last_of(engine, PROMPT)

    asyncio.run(main())


@asynccontextmanager
async def breakable(engine, tmp_path, monkeypatch, **options):
    """An EngineProcess whose steps do what the file `mischief` says, once: raise, or hang."""
    mischief, program, python = (tmp_path / name for name in ("mischief", "program.py", "python"))
    program.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from ingot.runtime.cpu import CpuExecutor
        from ingot.runtime.server import child

        launch, mischief = CpuExecutor.launch, Path({str(mischief)!r})

        def mischievous(self, batch):
            if mischief.exists():
                what = mischief.read_text()
                mischief.unlink()
                if what == "hang":
                    time.sleep(600)
                raise ValueError("the graph broke")
            return launch(self, batch)

        CpuExecutor.launch = mischievous
        sys.exit(child.main(sys.argv[3:]))
        """)
    )
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def break_it(how):
        (tmp_path / "new").write_text(how)
        (tmp_path / "new").rename(mischief)

    async with EngineProcess(engine, **options) as process:
        yield process, break_it


def test_failing_and_hanging_steps(demo_engine_fp32, tmp_path, monkeypatch):
    async def main():
        async with breakable(demo_engine_fp32, tmp_path, monkeypatch, watchdog=2.0) as (engine, break_it):
            expected = (await last_of(engine, PROMPT)).outputs[0].token_ids
            break_it("raise")  # nothing was handed out, so nobody notices but for the wait
            assert (await last_of(engine, PROMPT)).outputs[0].token_ids == expected
            assert engine.restarts == 1
            stream = engine.generate(PROMPT, LONG)
            await anext(stream)
            break_it("raise")
            with pytest.raises(EngineError, match=r"failed in a step \(ValueError: the graph broke\); it is being"):
                async for _ in stream:
                    pass
            await until(lambda: engine.healthy)
            stream = engine.generate(PROMPT, LONG)
            await anext(stream)
            break_it("hang")
            with pytest.raises(EngineError, match="committed no step for 2 s and was killed"):
                async for _ in stream:
                    pass
            assert (await last_of(engine, PROMPT)).outputs[0].token_ids == expected

    asyncio.run(main())


def test_a_request_that_breaks_the_engine_is_asked_again_only_once(demo_engine_fp32, tmp_path, monkeypatch):
    async def main():
        async with breakable(demo_engine_fp32, tmp_path, monkeypatch) as (engine, break_it):
            break_it("raise")
            task = asyncio.create_task(last_of(engine, PROMPT))
            await until(lambda: engine.restarts == 1 or not engine.healthy)
            break_it("raise")
            with pytest.raises(EngineError, match="the graph broke"):
                await task

    asyncio.run(main())


def test_an_engine_that_opens_no_more_is_given_up(demo_engine_fp32, tmp_path):
    folder = shutil.copytree(demo_engine_fp32, tmp_path / "engine")

    async def main():
        async with EngineProcess(folder, patience=0.2) as engine:
            await last_of(engine, PROMPT)
            await asyncio.sleep(0.1)
            (folder / "engine.json").unlink()
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: not engine.healthy)
            with pytest.raises(EngineError, match="is being restarted"):  # patience has an end
                await last_of(engine, PROMPT)
            await until(lambda: engine.gave_up)
            with pytest.raises(EngineError, match="did not open the engine .*3 times in a row"):
                engine.check()
            with pytest.raises(EngineError, match="3 times in a row"):
                await last_of(engine, PROMPT)
            assert not engine.healthy and not engine.metrics().healthy and engine.pid is None

    asyncio.run(main())


def test_an_engine_that_cannot_be_opened(tmp_path):
    async def main():
        with pytest.raises(EngineError) as here:
            LLM(tmp_path)
        with pytest.raises(EngineError) as there:
            async with EngineProcess(tmp_path):
                pass
        assert str(there.value) == str(here.value)
        with pytest.raises(EngineError, match="max_num_seqs is 0"):
            EngineProcess(tmp_path, max_num_seqs=0)
        with pytest.raises(EngineError, match="not been started"):
            EngineProcess(tmp_path).check()

    asyncio.run(main())


def test_a_start_that_takes_too_long_leaves_nothing_running(demo_engine_fp32):
    pids = []

    async def main():
        engine = EngineProcess(demo_engine_fp32, start_timeout=0.2)
        with pytest.raises(EngineError, match="not open after 0.2 s"):
            task = asyncio.create_task(engine.start())
            await asyncio.sleep(0.1)
            pids.append(engine._supervisor._starting.pid)
            await task

    asyncio.run(main())
    assert not alive(pids[0])


def test_the_engine_process_ends_with_its_parent(demo_engine_fp32):
    program = textwrap.dedent(f"""
        import asyncio
        from ingot import SamplingParams
        from ingot.runtime.server.engine import EngineProcess

        async def main():
            async with EngineProcess({str(demo_engine_fp32)!r}) as engine:
                async for _ in engine.generate([5, 6], SamplingParams(max_tokens=10000, ignore_eos=True)):
                    print(engine.pid, flush=True)

        asyncio.run(main())
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_slow_reader_gets_few_messages_and_garbage_ends_the_process(demo_engine_fp32):
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    setting = json.dumps({"engine": str(demo_engine_fp32), "options": {}})
    command = [sys.executable, "-m", child.__name__, str(theirs.fileno()), setting]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    frames = Frames(FromEngine)

    def heard():
        while data := ours.recv(1 << 16):
            yield from frames.feed(data)

    messages = heard()
    assert isinstance(next(messages), Ready)
    params = options(SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, logprobs=5))
    for number in range(4):
        ours.sendall(frame(Submit(number, [5, 6, 7], params, 0, time.monotonic())))
    busy = 0.0
    while busy != (busy := cpu_seconds(process.pid)):  # they run to their end while nobody reads
        time.sleep(1.5)
    tokens, news = {number: 0 for number in range(4)}, 0
    ended = 0
    while ended < 4:
        message = next(messages)
        if isinstance(message, News):
            news += 1
            for update in message.updates:
                for part in update.parts:
                    tokens[update.number] += len(part.token_ids)
                    assert len(part.logprobs) == len(part.token_ids)
                    ended += part.finish_reason is not None
    assert set(tokens.values()) == {400} and news < 100
    ours.sendall(frame(Ping()))
    while not isinstance(message := next(messages), Pong):
        pass
    assert message.steps >= 400 and not message.working
    ours.sendall(b"\xff\xff\xff\xffnonsense")
    while not isinstance(message := next(messages), Failed):
        pass
    assert "could not read the channel" in message.why
    assert process.wait(20) == child.BROKEN
    ours.close()
