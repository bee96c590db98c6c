"""Places for values in one arena, by liveness: values that are alive at the same time never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes; what cudaMalloc promises, and all that vector loads and tensor maps want


@dataclass(frozen=True)
class Interval:
    """`num_bytes` needed from launch `first` to launch `last`, both included."""

    num_bytes: int
    first: int
    last: int


def place(intervals: Sequence[Interval]) -> tuple[list[int], int]:
    """An offset for each interval, and the bytes of the arena.

    The largest first, each into the lowest gap among those alive with it (Pisarchyk and Lee, arXiv:2001.03288, greedy
    by size), which for decoders comes within a few percent of the most that is alive at once.
    """
    order = sorted(range(len(intervals)), key=lambda i: (-intervals[i].num_bytes, intervals[i].first))
    offsets = [0] * len(intervals)
    placed: list[int] = []  # by offset
    total = 0
    for i in order:
        wanted, end = intervals[i], 0
        size = -(-wanted.num_bytes // ALIGNMENT) * ALIGNMENT
        for j in placed:
            other = intervals[j]
            if other.first > wanted.last or other.last < wanted.first:
                continue
            if offsets[j] - end >= size:
                break
            end = max(end, offsets[j] + -(-other.num_bytes // ALIGNMENT) * ALIGNMENT)
        offsets[i] = end
        total = max(total, end + size)
        placed.append(i)
        placed.sort(key=offsets.__getitem__)
    return offsets, total
