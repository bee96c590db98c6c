"""`ingot bench --speculate`: the same engine with and without drafts, by the number of requests at a time.

Both answer the same prompts, in turns, in one process: requests without speculation ask for none, and a batch of such
runs as on an engine that has none. Prompts are new in each round, so that nothing is known of an answer beforehand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engines.errors import RequestError
from ..async_llm import AsyncLLM
from ..bench import Job, run
from ..request import SamplingParams
from .statistics import SpeculationStats

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Level:
    """What was measured with so many requests at a time. Rates are output tokens a second, medians of the rounds.

    speedup: median of the rounds' ratios. mean_length: tokens of a request where drafts were verified. share: of the
    steps with speculation, how many verified drafts. accepted_at: share of drafts whose first, second, .. token held.
    """

    concurrency: int
    plain: float
    speculating: float
    speedup: float
    mean_length: float | None
    share: float
    accepted_at: tuple[float, ...]


async def written(llm: AsyncLLM, num: int, length: int, seed: int) -> list[list[int]]:
    """Prompts for want of a file: what the model itself writes, sampled, since random tokens say nothing of drafts."""
    params = [
        SamplingParams(temperature=1.0, seed=seed + i, max_tokens=length, ignore_eos=True, speculate=False)
        for i in range(num)
    ]
    first = (seed + 1) % llm.vocab_size
    found: list[list[int]] = []

    async def keep(prompt: Any, how: SamplingParams) -> Any:
        async for output in llm.generate(prompt, how):
            yield output
        found.append(list(output.outputs[0].token_ids))

    await run(keep, [Job([first], each) for each in params], concurrency=llm.max_num_seqs)
    return found


async def compare(
    llm: AsyncLLM, jobs: Sequence[Job], levels: Sequence[int], rounds: int, on_done: Callable[[Level], None]
) -> list[Level]:
    """jobs: taken in order, as many for a round as `num_of` says, `rounds` times for each level."""
    left: Iterator[Job] = iter(jobs)
    measured = []
    for level in levels:
        pairs: list[tuple[float, float]] = []
        counts = SpeculationStats()
        for turn in range(rounds):
            some = [next(left) for _ in range(num_of(level))]
            rates = [0.0, 0.0]
            for with_drafts in (0, 1) if turn % 2 else (1, 0):  # neither is always the first
                before = llm.metrics().speculation
                rates[with_drafts] = await _rate(llm, some, level, bool(with_drafts))
                if with_drafts:
                    counts = _sum(counts, before, llm.metrics().speculation)
            pairs.append((rates[0], rates[1]))
        found = Level(
            level, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs),
            statistics.median(b / a for a, b in pairs), counts.mean_length, counts.share or 0.0,
            tuple(round(n / counts.drafts, 3) for n in counts.accepted_at) if counts.drafts else (),
        )  # fmt: skip
        measured.append(found)
        on_done(found)
    return measured


def num_of(level: int) -> int:
    """Requests of a round."""
    return max(4, level)


async def _rate(llm: AsyncLLM, jobs: Sequence[Job], level: int, with_drafts: bool) -> float:
    mine = [Job(job.prompt, replace(job.params, speculate=with_drafts)) for job in jobs]
    start = time.perf_counter()
    timings = await run(lambda p, how: llm.generate(p, how, deltas=True), mine, concurrency=level)
    seconds = time.perf_counter() - start
    if wrong := next((timing.error for timing in timings if timing.error), None):
        raise RequestError(wrong)
    return sum(timing.num_output for timing in timings) / seconds


def _sum(counts: SpeculationStats, before: SpeculationStats, after: SpeculationStats) -> SpeculationStats:
    """counts and what came between two snapshots."""
    added: dict[str, Any] = {}
    for name, value in asdict(after).items():
        old, so_far = getattr(before, name), getattr(counts, name)
        if isinstance(value, tuple):
            so_far, old = (tuple(some) or (0,) * len(value) for some in (so_far, old))
            added[name] = tuple(a + b - c for a, b, c in zip(so_far, value, old, strict=True))
        else:
            added[name] = so_far + value - old
    return SpeculationStats(**added)


def show(title: str, levels: Sequence[Level], console: Console) -> None:
    """A table, a line for each level."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for column in ("at a time", "tokens/s without", "with", "speed-up", "tokens a verification", "steps with drafts",
                   "accepted by position"):  # fmt: skip
        table.add_column(column, justify="right")
    for level in levels:
        length = f"{level.mean_length:.2f}" if level.mean_length else "-"
        table.add_row(
            str(level.concurrency), f"{level.plain:.0f}", f"{level.speculating:.0f}", f"{level.speedup:.2f}x", length,
            f"{level.share:.0%}", " ".join(f"{share:.2f}" for share in level.accepted_at),
        )  # fmt: skip
    console.print(table)


def draw(title: str, levels: Sequence[Level], path: Path) -> None:
    """Speed-up, and tokens a verification, over the number of requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    figure.suptitle(title)
    at = [level.concurrency for level in levels]
    axes[0].axhline(1.0, color="grey", linewidth=1)
    axes[0].plot(at, [level.speedup for level in levels], marker="o")
    axes[0].set(title="speed-up", xlabel="requests at a time", xscale="log", ylim=(0, None))
    axes[1].plot(at, [level.mean_length or 1.0 for level in levels], marker="o")
    axes[1].set(title="tokens of a verification", xlabel="requests at a time", xscale="log", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(at, [str(number) for number in at])
        axis.minorticks_off()
    figure.savefig(path)
