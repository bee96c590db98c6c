"""The bench's arithmetic, on a fake engine whose delays are known."""

import asyncio
import json

import pytest
import typer
from ingot.engines.errors import RequestError
from ingot.runtime.bench import Job, Timing, from_file, lengths, percentiles, report, run, synthetic
from ingot.runtime.bench_cli import _sizes
from ingot.runtime.request import CompletionOutput, RequestOutput, SamplingParams


class FakeEngine:
    """Answers a token each `delay` seconds; counts how many requests it holds at a time."""

    def __init__(self, delay=0.002):
        self.delay, self.now, self.most = delay, 0, 0

    async def generate(self, prompt, params):
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if len(prompt) > 100:
                raise RequestError("the prompt is too long.")
            for i in range(params.max_tokens):
                await asyncio.sleep(self.delay)
                answer = CompletionOutput(0, "", [i])
                yield RequestOutput("0", None, prompt, [answer], i + 1 == params.max_tokens, num_cached_tokens=1)
        finally:
            self.now -= 1


def test_synthetic_workload_is_what_was_asked_for():
    jobs = synthetic(50, "4:9", "3", vocab_size=10, seed=1, prefix_len=2)
    assert jobs == synthetic(50, "4:9", "3", vocab_size=10, seed=1, prefix_len=2)
    assert jobs != synthetic(50, "4:9", "3", vocab_size=10, seed=2, prefix_len=2)
    assert {len(job.prompt) for job in jobs} == set(range(6, 12))
    assert len({tuple(job.prompt[:2]) for job in jobs}) == 1
    assert all(job.params.max_tokens == 3 and job.params.ignore_eos for job in jobs)
    assert {token for job in jobs for token in job.prompt} == set(range(10))


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "5:4", "1:2:3", "1.5", ":4", "9" * 5000, "1:" + "9" * 5000])
def test_a_wrong_length_is_refused(text):
    with pytest.raises(RequestError, match="expected a number"):
        lengths(text)
    with pytest.raises(typer.BadParameter, match="--levels is .*, expected numbers above 0 such as 1,64"):
        _sizes("levels", text or "0")


def test_file_workload(tmp_path):
    (tmp_path / "text.txt").write_text("one\n\ntwo\n")
    assert [job.prompt for job in from_file(tmp_path / "text.txt", 3, "5", 0)] == ["one", "two", "one"]
    lines = [{"prompt": "hi", "max_tokens": 7}, {"prompt_token_ids": [1, 2], "temperature": 0.5}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = from_file(tmp_path / "jobs.jsonl", None, "5", 0)
    assert first == Job("hi", SamplingParams(temperature=0.0, max_tokens=7))
    assert second == Job([1, 2], SamplingParams(temperature=0.5, max_tokens=5))
    for bad in ("{", "[]", "3", "{}", '{"prompt": "x", "max_tokns": 1}', "[" * 100_000):
        (tmp_path / "bad.jsonl").write_text(bad)
        with pytest.raises(RequestError):
            from_file(tmp_path / "bad.jsonl", None, "5", 0)
    (tmp_path / "ends.jsonl").write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert from_file(tmp_path / "ends.jsonl", None, "5", 0)[0].prompt == "a\u2028b\x85c"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(RequestError, match="is not UTF-8 text"):
        from_file(tmp_path / "latin.txt", None, "5", 0)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        from_file(tmp_path / "empty.txt", None, "5", 0)
    with pytest.raises(RequestError, match="not a file"):
        from_file(tmp_path / "none.txt", None, "5", 0)


def test_concurrency_bounds_the_requests_held():
    engine, done = FakeEngine(), []
    jobs = [Job([1] * 5, SamplingParams(max_tokens=4))] * 12
    timings = asyncio.run(run(engine.generate, jobs, concurrency=3, on_done=lambda: done.append(1)))
    assert engine.most == 3 and len(done) == 12
    assert all(t.num_output == 4 and len(t.deliveries) == 4 and t.num_prompt == 5 for t in timings)


def test_open_load_does_not_wait_for_answers():
    engine = FakeEngine(delay=0.05)
    jobs = [Job([1], SamplingParams(max_tokens=1))] * 10
    timings = asyncio.run(run(engine.generate, jobs, rate=2000.0, seed=3))
    assert engine.most > 3
    assert [t.sent for t in timings] == sorted(t.sent for t in timings)


def test_a_refused_request_is_counted_as_failed():
    jobs = [Job([1] * n, SamplingParams(max_tokens=2)) for n in (5, 500)]
    figures = report(asyncio.run(run(FakeEngine().generate, jobs, concurrency=1)), 1.0)
    assert figures["requests"] == 2 and figures["failed"] == 1
    assert figures["first_error"] == "the prompt is too long."
    assert figures["output_tokens"] == 2 and figures["input_tokens"] == 5


def test_figures_of_known_times():
    timings = [Timing(10.0, [10.5, 10.6, 10.9], num_prompt=7, num_output=5), Timing(11.0, [11.1], 3, 1, num_cached=2)]
    figures = report(timings, 2.0)
    assert figures["ttft_ms"]["max"] == pytest.approx(500) and figures["ttft_ms"]["p50"] == pytest.approx(100)
    assert figures["tpot_ms"]["p50"] == pytest.approx(100)  # 0.4 s over the 4 tokens after the first
    assert figures["inter_token_ms"]["max"] == pytest.approx(300)
    assert figures["output_tokens_per_s"] == 3 and figures["total_tokens_per_s"] == 8
    assert figures["cached_input_tokens"] == 2 and figures["peak_memory_bytes"] > 1 << 20
    assert report([], 1.0)["ttft_ms"] is None


def test_percentiles_are_values_that_occurred():
    found = percentiles([i / 1000 for i in range(1, 101)])
    assert [found[p] for p in ("p50", "p90", "p99", "max")] == pytest.approx([50, 90, 99, 100])
    assert percentiles([0.5])["p99"] == 500
