"""Traced steps -> a table: time of each op in a step, its floor, and what is left of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from ...engines.errors import EngineError
from ...plugins.tactic import Site
from .floor import Ceilings, cost, label
from .workload import Watched, Workload


@dataclass(frozen=True)
class Unit:
    """A node of a step and how many kernels it launches. part: of the plan (`body` and so on)."""

    site: Site
    part: str
    num_launches: int = 1


SLOW = 1.5  # times the median


@dataclass(frozen=True)
class Traced:
    """A step as it ran; microseconds. times: of each unit, without what overlaps with units before it; summed: of all
    kernels by themselves, overlaps counted twice."""

    units: Sequence[Unit]
    times: Sequence[float]
    start: float
    end: float
    summed: float


@dataclass(frozen=True)
class Row:
    """All units of a step with one label; launches and microseconds are those of one step."""

    op: str
    launches: int
    us: float
    floor_us: float

    @property
    def ratio(self) -> float:
        """Time over floor."""
        return self.us / self.floor_us if self.floor_us else float("inf")


@dataclass(frozen=True)
class Profile:
    """A step of one load, the mean of `num_steps`, without those that were SLOW; microseconds.

    context: keys of a sequence. bucket: tokens that the step was padded to. wall_us: from the step's first kernel to
    the next step's while decoding, to its own last one for a prompt. host_us: of the loop's thread, waiting left out.
    untraced_us: a step's time seen from the loop, without the profiler.
    """

    phase: str
    sequences: int
    tokens: int
    context: int
    bucket: int
    num_steps: int
    rows: tuple[Row, ...]
    summed_us: float
    wall_us: float
    host_us: float
    untraced_us: float

    @property
    def busy_us(self) -> float:
        """The time in which something ran."""
        return sum(row.us for row in self.rows)

    @property
    def floor_us(self) -> float:
        return sum(row.floor_us for row in self.rows)

    @property
    def idle(self) -> float:
        """The share of the step in which nothing ran."""
        return max(0.0, 1 - self.busy_us / self.wall_us)

    @property
    def title(self) -> str:
        if self.phase == "decode":
            told = f"decode, {self.sequences} sequences of {self.context} keys"
        else:
            told = f"prefill, a prompt of {self.tokens} tokens"
        return told + (f" (padded to {self.bucket})" if self.bucket != self.tokens else "")

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {"op": row.op, "launches": row.launches, "us": row.us, "share": row.us / self.wall_us,
             "floor_us": row.floor_us, "ratio": row.ratio if row.floor_us else None}
            for row in self.rows
        ]  # fmt: skip
        totals = ("phase", "sequences", "tokens", "context", "bucket", "num_steps", "summed_us", "busy_us", "wall_us",
                  "idle", "floor_us", "host_us", "untraced_us")  # fmt: skip
        return {name: getattr(self, name) for name in totals} | {"rows": rows}


def summarise(
    workload: Workload, plain: Sequence[Watched], steps: Sequence[Watched], traced: Sequence[Traced | None],
    ceilings: Ceilings, bucket: int,
) -> Profile:  # fmt: skip
    """The table of a load. plain: its steps without the profiler; steps, traced: with it, one for one."""
    walls = {i: wall for i in workload.steady(steps) if (wall := _wall(workload, traced, i)) is not None}
    if not walls:
        raise EngineError(f"none of the {len(steps)} steps was traced whole; profile again.")
    # now and then a profiler stops to write, or the machine does something else
    usual = SLOW * median(walls.values())
    steady = [i for i, wall in walls.items() if wall <= usual]
    kept = [each for i in steady if (each := traced[i])]
    load = steps[steady[len(steady) // 2]].load  # contexts grow by a key a step: the one in the middle is the mean
    times = [mean(values) for values in zip(*(each.times for each in kept), strict=True)]
    found: dict[str, Row] = {}
    for unit, us in zip(kept[0].units, times, strict=True):
        name, floor = label(unit.site), ceilings.microseconds(cost(unit.site, unit.part, load))
        row = found.get(name, Row(name, 0, 0.0, 0.0))
        found[name] = Row(name, row.launches + unit.num_launches, row.us + us, row.floor_us + floor)
    return Profile(
        phase="decode" if workload.decoding else "prefill", sequences=workload.sequences, tokens=load.tokens,
        context=round(mean(load.keys)), bucket=bucket, num_steps=len(kept),
        rows=tuple(sorted(found.values(), key=lambda row: -row.us)), summed_us=mean(each.summed for each in kept),
        wall_us=mean(walls[i] for i in steady), host_us=1e6 * median(_host(plain, workload)),
        untraced_us=1e6 * _period(plain, workload),
    )  # fmt: skip


def _wall(workload: Workload, traced: Sequence[Traced | None], i: int) -> float | None:
    """Microseconds of step i: to the next one's first kernel while decoding, to its own last one for a prompt."""
    this, after = traced[i], traced[i + 1] if i + 1 < len(traced) else None
    if not workload.decoding:
        return this.end - this.start if this else None
    return after.start - this.start if this and after else None


def _host(steps: Sequence[Watched], workload: Workload) -> list[float]:
    """Seconds that the loop's thread works for a step: between two launches, less what it waits in between."""
    if not workload.decoding:  # one prompt at a time: nothing overlaps
        return [steps[i].done - steps[i].began - steps[i].wait for i in workload.steady(steps)]
    # while step i is in flight, the loop waits for the one before it
    return [
        steps[i + 1].began - steps[i].began - steps[i - 1].wait
        for i in workload.steady(steps)
        if 0 < i < len(steps) - 1
    ]


def _period(steps: Sequence[Watched], workload: Workload) -> float:
    """Seconds of a step, the median as the loop sees it."""
    steady = workload.steady(steps)
    if not workload.decoding:
        return median(steps[i].done - steps[i].began for i in steady)
    return median(steps[i + 1].began - steps[i].began for i in steady if i + 1 < len(steps))
