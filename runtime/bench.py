"""`ingot bench`: a workload sent to an engine, and what its users would have felt.

Load is closed (`concurrency` requests at any time) or open (`rate` requests a second, Poisson arrivals that wait for no
answer). Times are the client's: TTFT from sending to the first token, TPOT = (end - first token) / (tokens - 1),
inter-token latency the gap between two deliveries. Every number comes from tokens that arrived; a request that failed
is counted, never dropped.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engines.errors import RequestError, shown
from .request import RequestOutput, SamplingParams

Prompt = str | list[int]
Submit = Callable[[Prompt, SamplingParams], AsyncIterator[RequestOutput]]  # each output holds only what is new


@dataclass(frozen=True)
class Job:
    """One request of a workload."""

    prompt: Prompt
    params: SamplingParams


@dataclass
class Timing:
    """One request as its client saw it; seconds on `time.perf_counter()`."""

    sent: float
    deliveries: list[float] = field(default_factory=list)
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    error: str | None = None


def lengths(text: str) -> tuple[int, int]:
    """`"128"` -> (128, 128), `"16:512"` -> (16, 512): a fixed length, or one drawn evenly from a range."""
    low, _, high = text.partition(":")
    high = high or low
    if not (all(each.isdecimal() and len(each) < 10 for each in (low, high)) and 0 < int(low) <= int(high)):
        raise RequestError(f"{shown(text)} is not a length; expected a number such as 128 or a range such as 16:512.")
    return int(low), int(high)


def synthetic(
    num_requests: int, input_len: str, output_len: str, vocab_size: int, seed: int, prefix_len: int = 0
) -> list[Job]:
    """Requests of random tokens, `prefix_len` of them shared by all; outputs run to their full length."""
    rng = random.Random(seed)
    prefix = [rng.randrange(vocab_size) for _ in range(prefix_len)]
    inputs, outputs = lengths(input_len), lengths(output_len)
    jobs = []
    for _ in range(num_requests):
        own = [rng.randrange(vocab_size) for _ in range(rng.randint(*inputs))]
        params = SamplingParams(temperature=0.0, max_tokens=rng.randint(*outputs), ignore_eos=True)
        jobs.append(Job(prefix + own, params))
    return jobs


def from_file(path: Path, num_requests: int | None, output_len: str, seed: int) -> list[Job]:
    """Requests from a file, taken in order and repeated if there are too few: a prompt a line, or JSONL.

    A JSONL line is an object with `prompt` (text) or `prompt_token_ids`, and any field of SamplingParams beside it.
    """
    if not path.is_file():
        raise RequestError(f"{path} is not a file; expected text with one prompt a line, or JSONL.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    rng, jobs = random.Random(seed), []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() cuts at U+2028 too, which JSON has in strings
        if not line.strip():
            continue
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randint(*lengths(output_len))}
        prompt: Any = line
        if path.suffix in (".jsonl", ".json"):
            try:
                fields = json.loads(line)
                prompt = fields.pop("prompt") if "prompt" in fields else fields.pop("prompt_token_ids")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise RequestError(
                    f"line {number} of {path} is not a request; expected a JSON object with prompt or prompt_token_ids."
                ) from None
            options |= fields
        jobs.append(Job(prompt, SamplingParams.of(**options)))
    if not jobs:
        raise RequestError(f"{path} holds no prompt; expected one a line.")
    wanted = num_requests or len(jobs)
    return [jobs[i % len(jobs)] for i in range(wanted)]


async def run(
    submit: Submit,
    jobs: Sequence[Job],
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    seed: int = 0,
    on_done: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Send every job and wait for all answers: at most `concurrency` at a time, `rate` a second, or both."""
    rng, places = random.Random(seed), asyncio.Semaphore(concurrency or len(jobs))
    start, when, tasks = time.perf_counter(), 0.0, []
    for job in jobs:
        if rate:
            await asyncio.sleep(max(0.0, start + when - time.perf_counter()))
            when += rng.expovariate(rate)
        tasks.append(asyncio.create_task(_one(submit, job, places, on_done)))
    return list(await asyncio.gather(*tasks))


async def _one(submit: Submit, job: Job, places: asyncio.Semaphore, on_done: Callable[[], None]) -> Timing:
    async with places:
        timing = Timing(time.perf_counter())
        try:
            async for output in submit(job.prompt, job.params):
                num_new = sum(len(answer.token_ids) for answer in output.outputs)
                if num_new:
                    timing.deliveries.append(time.perf_counter())
                timing.num_output += num_new
                timing.num_prompt, timing.num_cached = len(output.prompt_token_ids), output.num_cached_tokens
        except RequestError as error:
            timing.error = str(error)
        on_done()
        return timing


def report(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """The figures: counts, throughput per second of wall time, latencies in milliseconds, peak memory in bytes."""
    good = [t for t in timings if t.error is None and t.deliveries]
    gaps = [b - a for t in good for a, b in zip(t.deliveries, t.deliveries[1:], strict=False)]
    tpots = [(t.deliveries[-1] - t.deliveries[0]) / (t.num_output - 1) for t in good if t.num_output > 1]
    num_input, num_output = sum(t.num_prompt for t in good), sum(t.num_output for t in good)
    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "first_error": next((t.error for t in timings if t.error), None),
        "seconds": seconds,
        "input_tokens": num_input,
        "cached_input_tokens": sum(t.num_cached for t in good),
        "output_tokens": num_output,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": num_output / seconds,
        "total_tokens_per_s": (num_input + num_output) / seconds,
        "ttft_ms": percentiles([t.deliveries[0] - t.sent for t in good]),
        "tpot_ms": percentiles(tpots),
        "inter_token_ms": percentiles(gaps),
        "end_to_end_ms": percentiles([t.deliveries[-1] - t.sent for t in good]),
        "peak_memory_bytes": peak_memory(),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, p50, p90, p99 and the largest, in milliseconds, by nearest rank; None for no values."""
    if not seconds:
        return None
    ordered = sorted(1000 * s for s in seconds)
    at = {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)}  # nearest rank
    return {"mean": sum(ordered) / len(ordered), **at, "max": ordered[-1]}


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (memory-mapped weights that were touched included)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
