"""A trace of kernels -> steps, and each kernel of a step -> the launch of the plan that it is.

Kernels of our own are known by their symbols; a product of a library has a name of its own and may be several kernels.
Kernels may overlap (programmatic dependent launch: one starts early and waits), so a kernel counts from where those
before it have ended, and the times of a step add up to the time in which any kernel ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engines.errors import EngineError

ASIDE = "reduce", "memset"  # what a product of a library does besides its main kernel


class TraceError(EngineError):
    """The trace is not what the plan launches."""


@dataclass(frozen=True)
class Event:
    """A kernel that ran on the GPU, or memory that it cleared: microseconds of the profiler's clock."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def split(events: Sequence[Event], first: str) -> list[list[Event]]:
    """Steps, each from a kernel named `first` to the next, ordered by start; what comes before the first is dropped."""
    steps: list[list[Event]] = []
    for event in sorted(events, key=lambda event: event.start):
        if event.name == first:
            steps.append([])
        if steps:
            steps[-1].append(event)
    return steps


def exclusive(events: Sequence[Event]) -> list[float]:
    """Microseconds of each kernel that none before it covers; they add up to the union of all."""
    found, ended = [], float("-inf")
    for event in events:
        found.append(max(0.0, event.end - max(event.start, ended)))
        ended = max(ended, event.end)
    return found


def align(names: Sequence[str], symbols: Sequence[str | None]) -> list[int]:
    """The launch that each kernel of a step is. symbols: of the launches in order, None for a library's product.

    Raises TraceError with the place of the first kernel that is missing, or one too many.
    """
    known = {symbol for symbol in symbols if symbol}
    owners: list[int] = []
    launch = 0
    while launch < len(symbols):
        symbol, at = symbols[launch], len(owners)
        if symbol:
            if names[at : at + 1] != [symbol]:
                raise _missing(names, at, launch, len(symbols), symbol)
            owners.append(launch)
            launch += 1
            continue
        last = launch
        while last < len(symbols) and symbols[last] is None:
            last += 1
        found = []
        for name in names[at:]:
            if name in known:
                break
            found.append(name)
        # of products in a row, a reduction (over a split depth) belongs to the one before it
        alone = last - launch == 1
        firsts = [i for i, name in enumerate(found) if (i == 0 if alone else not any(w in name.lower() for w in ASIDE))]
        if len(firsts) != last - launch or "reduce" in found[0].lower():
            raise _missing(names, at + len(found), last - 1, len(symbols), "a product of cuBLASLt")
        owners += [launch - 1 + max(1, sum(first <= i for first in firsts)) for i in range(len(found))]
        launch = last
    if len(owners) != len(names):
        raise TraceError(f"a step's trace goes on with {names[len(owners)]} after the last of its {launch} launches.")
    return owners


def _missing(names: Sequence[str], at: int, launch: int, total: int, expected: str) -> TraceError:
    found = names[at] if at < len(names) else "the end"
    return TraceError(f"a step's trace has {found} where launch {launch + 1} of {total} is {expected}.")
