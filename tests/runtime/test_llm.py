"""`LLM` and `AsyncLLM` over a hand-made engine of the draft model: streams, cancellation, refusals, failures."""

import asyncio
import multiprocessing
import threading

import pytest
import torch
from hand_made import DEMO, cast_llama, greedy, prompts_of
from ingot import LLM, AsyncLLM, SamplingParams
from ingot.engines.errors import EngineError, RequestError
from transformers import AutoModelForCausalLM

CHECKPOINT = DEMO / "pycoder-draft-2m"
LONG = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)


def until(condition, llm, seconds=10.0):
    """Waits for `condition(llm.metrics())`."""
    waited = threading.Event()
    for _ in range(int(seconds * 100)):
        if condition(llm.metrics()):
            return
        waited.wait(0.01)
    raise AssertionError(llm.metrics())


def idle(metrics):
    return metrics.running == 0 and metrics.waiting == 0 and metrics.kv_utilisation == 0


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return cast_llama(CHECKPOINT, tmp_path_factory.mktemp("engines") / "draft")


@pytest.fixture
def llm(engine):
    with LLM(engine) as llm:
        yield llm


def test_greedy_is_that_of_transformers(llm):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    prompts = prompts_of(1, 60, 12)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), progress=False)
    assert [output.prompt_token_ids for output in outputs] == prompts, "answers come in the order of the prompts"
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy(model, prompt, 20)


def test_a_stream_adds_up_to_the_whole(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = llm.generate("def main():\n", params, progress=False)[0].outputs[0]
    parts = list(llm.stream("def main():\n", params, deltas=True))
    assert "".join(part.outputs[0].text for part in parts) == whole.text
    assert [t for part in parts for t in part.outputs[0].token_ids] == whole.token_ids
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert list(llm.stream("def main():\n", params))[-1].outputs[0].text == whole.text


def test_leaving_a_stream_frees_its_pages(llm):
    for output in llm.stream("class Stack:\n", LONG):
        if len(output.outputs[0].token_ids) > 3:
            break
    del output
    until(idle, llm)
    assert llm.metrics().finished == {"abort": 1}


def test_several_answers_with_seeds(llm):
    params = SamplingParams(temperature=1.0, n=3, seed=7, max_tokens=12)
    first, second = (llm.generate("import ", params, progress=False)[0] for _ in range(2))
    assert [a.token_ids for a in first.outputs] == [a.token_ids for a in second.outputs]
    assert len({tuple(a.token_ids) for a in first.outputs}) == 3


def test_threads_share_the_engine(llm):
    prompts = prompts_of(2, 30, 6)
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    alone = [llm.generate(prompt, params, progress=False)[0].outputs[0].token_ids for prompt in prompts]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: found.update({i: llm.generate(p, params, progress=False)}))
        for i, p in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i][0].outputs[0].token_ids for i in range(len(prompts))] == alone


def test_a_bad_prompt_costs_the_others_nothing(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", ""], LONG, progress=False)
    with pytest.raises(RequestError, match="4096"):
        llm.generate([[5] * 5000], progress=False)
    with pytest.raises(RequestError, match="4096"):
        llm.generate([[5, 4096]], progress=False)
    wrong = ("fine \ud800", "not Unicode"), (b"bytes", "text or a list"), ([1, True], "text or a list")
    wrong += (({"prompt_token_ids": torch.tensor([1, 2])}, "text or a list"),)
    wrong += (({"prompt": "a", "multi_modal_data": {"image": 1}}, "the key 'multi_modal_data', .* keys are prompt"),)
    wrong += (({"prompt_token_ids": [1], "cache_salt": "x"}, "the key 'cache_salt', which is not supported"),)
    wrong += (({}, "without a value; give it prompt"), ({"prompt": None}, "without a value; give it prompt"))
    wrong += (({"prompt": [1, 2]}, "prompt is .*it must be text"), ({"prompt_token_ids": "ab"}, "is 'ab'; it must be"))
    for prompt, sentence in wrong:
        with pytest.raises(RequestError, match=sentence):
            llm.generate(["fine", prompt], progress=False)
    huge = 10**5000  # more digits than Python writes
    for prompt in (huge, [huge], [[5, huge]], [[huge, "a"]], {"prompt": huge}, {huge: 1}, {"prompt_token_ids": [huge]}):
        with pytest.raises(RequestError, match="The prompt.*(thousands of digits|too long to show)"):
            llm.generate(prompt, progress=False)
    for messages in (huge, 1.5, [{"role": "user", "content": huge}], [{"role": huge}]):
        with pytest.raises(RequestError, match="message.*; (they|it) must be"):
            llm.chat(messages, progress=False)
    with pytest.raises(RequestError, match="sampling_params is a number of thousands of digits for 1 prompts"):
        llm.generate("fine", huge, progress=False)
    with pytest.raises(RequestError, match="2 of them for 1 prompts"):
        llm.generate(["fine"], [LONG, LONG], progress=False)
    with pytest.raises(RequestError, match="0 of them for 1 prompts"):
        llm.generate(["fine"], [], progress=False)
    with pytest.raises(RequestError, match="it must be an object"):
        llm.chat({"role": "user", "content": "fine"}, progress=False)
    for name in ("messages", "template", "bos_token"):
        with pytest.raises(RequestError, match=f"chat_template_kwargs sets {name}, which is not for it"):
            llm.chat([{"role": "user", "content": "fine"}], chat_template_kwargs={name: 1}, progress=False)
    none_left = SamplingParams(stop_token_ids=range(llm.vocab_size), min_tokens=1)
    with pytest.raises(RequestError, match="min_tokens is 1, but each"):
        llm.generate(["fine", "fine"], [LONG, none_left], progress=False)
    assert llm.metrics().steps == 0, "nothing was run for any of them"
    both = {"prompt": "shown", "prompt_token_ids": [5, 6], "multi_modal_data": None}
    (output,) = llm.generate(both, SamplingParams(max_tokens=1), progress=False)
    assert (output.prompt, output.prompt_token_ids) == ("shown", [5, 6])
    assert llm.generate("fine", SamplingParams(max_tokens=1), progress=False)[0].finished


def test_a_pool_too_small_for_one_request(engine):
    with LLM(engine, num_kv_pages=4, page_size=8) as llm, pytest.raises(RequestError, match="pool holds 24"):
        llm.generate([[5] * 60], progress=False)


def break_the_graph(llm):
    def broken(self, inputs):
        raise ValueError("the graph broke")

    llm._session.executor.graph.__class__ = type("Broken", (), {"__call__": broken})


def test_a_step_that_fails_fails_every_request(llm):
    failed = []

    def ask():
        try:
            llm.generate([[5, 6, 7]] * 3, LONG, progress=False)
        except EngineError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda metrics: metrics.running == 6, llm)
    break_the_graph(llm)
    for thread in threads:
        thread.join(20)
    assert len(failed) == 2 and all("the graph broke" in message for message in failed)
    assert not llm.healthy and not llm.metrics().healthy
    with pytest.raises(EngineError, match="the graph broke"):
        llm.generate("later", progress=False)


def test_closing_ends_what_is_open(engine):
    llm = LLM(engine)
    stream = llm.stream("def ", LONG)
    next(stream)
    llm.close()
    llm.close()
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort" and not llm.healthy
    with pytest.raises(EngineError, match="closed"):
        llm.generate("def ", progress=False)


def test_a_forked_child_is_told_to_open_its_own(llm):
    def ask(answers):
        try:
            llm.generate([[5, 6, 7]], LONG, progress=False)
        except EngineError as error:
            answers.put((str(error), llm.healthy))
        llm.close()  # nor does the child wait for a loop that it has not

    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    child = fork.Process(target=ask, args=(answers,), daemon=True)
    child.start()
    child.join(20)
    assert child.exitcode == 0 and not answers.empty()
    message, healthy = answers.get()
    assert "was forked" in message and "spawn" in message and not healthy
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2), progress=False)[0].outputs[0].token_ids


def test_async_streams_share_steps(engine):
    async def ask(llm, prompt, params):
        async for output in llm.generate(prompt, params):
            last = output
        return last.outputs[0].token_ids

    async def main():
        async with AsyncLLM(engine) as llm:
            params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
            together = await asyncio.gather(*(ask(llm, prompt, params) for prompt in prompts))
            steps = llm.metrics().steps
            alone = [await ask(llm, prompt, params) for prompt in prompts]
            return together, alone, steps

    prompts = prompts_of(2, 40, 8)
    together, alone, steps = asyncio.run(main())
    assert together == alone
    assert steps < 8 * 25 / 2


def test_no_id_of_the_engine_is_a_callers(engine):
    async def ask(llm, request_id):
        return [output async for output in llm.generate("def main():\n", SamplingParams(max_tokens=4), request_id)][-1]

    async def main():
        async with AsyncLLM(engine) as llm:
            return await asyncio.gather(*(ask(llm, each) for each in ("0", "1", None, None, "2", "3")))

    outputs = asyncio.run(main())
    assert all(output.finished for output in outputs) and len({output.request_id for output in outputs}) == 6


def test_async_cancel_and_going_away(engine):
    async def first_of(llm, request_id=None):
        async for output in llm.generate("def ", LONG, request_id):
            return output

    async def main():
        async with AsyncLLM(engine) as llm:
            await first_of(llm)  # leaves the iteration: the generator is closed with it
            task = asyncio.create_task(anext_forever(llm))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            outputs = []
            async for output in llm.generate("def ", LONG, "mine"):
                outputs.append(output)
                if len(outputs) == 2:
                    llm.cancel("mine")
            assert outputs[-1].outputs[0].finish_reason == "abort"
            mine = llm.generate("def ", SamplingParams(max_tokens=300, ignore_eos=True), "mine")
            assert not (await anext(mine)).finished
            other = asyncio.ensure_future(anext(llm.generate("def ", LONG, "mine")))
            await asyncio.sleep(0)  # the other one of that id is on its way, and gives up before it is refused
            other.cancel()
            assert [output async for output in mine][-1].outputs[0].finish_reason == "length"
            llm.cancel("nobody")
            for _ in range(500):
                if idle(llm.metrics()):
                    break
                await asyncio.sleep(0.01)
            assert idle(llm.metrics()) and llm.metrics().finished == {"abort": 3, "length": 1}
            with pytest.raises(RequestError, match="empty"):
                await first_of_prompt(llm, "")

    async def anext_forever(llm):
        async for _ in llm.generate("class ", LONG):
            pass

    async def first_of_prompt(llm, prompt):
        async for output in llm.generate(prompt):
            return output

    asyncio.run(main())
