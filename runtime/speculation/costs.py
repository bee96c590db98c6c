"""What steps cost: seconds by number of tokens, measured on the engine that is about to serve.

The measurement takes a fraction of a second when the engine opens. Below a few tokens a step costs what reading the
weights does, and drafts are nearly free; above, it grows with every token, and they are not.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...engines import step as names
from ...engines.sampling import MAX_BRANCHES

if TYPE_CHECKING:
    import torch  # which engines for a GPU are served without

BUDGET = 0.5  # seconds of measuring: larger sizes are taken to cost as much a token as the largest measured
REPEATS = 8  # the quickest counts: what is slower was disturbed


class Curve:
    """Seconds of a step by its tokens: straight lines between what was measured, never falling."""

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]):
        self._sizes = list(sizes)
        self._seconds = [max(seconds[: i + 1]) for i in range(len(seconds))]

    def __call__(self, size: float) -> float:
        sizes, seconds = self._sizes, self._seconds
        if size >= sizes[-1]:
            return seconds[-1] * size / sizes[-1]
        i = bisect_left(sizes, size)
        if not i:
            return seconds[0]
        share = (size - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])

    def then(self, size: int, seconds: float) -> Curve:
        """The same with one point more, behind the others."""
        return Curve([*self._sizes, size], [*self._seconds, seconds])

    @classmethod
    def measure(cls, run: Callable[[int], object], most: int, budget: float = BUDGET) -> Curve:
        """run(size): a step of so many tokens, up to `most`."""
        sizes: list[int] = []
        seconds: list[float] = []
        size, began = 1, time.perf_counter()
        while not sizes or (sizes[-1] < most and time.perf_counter() - began < budget):
            times: list[float] = []
            while len(times) < 2 or (len(times) < REPEATS and time.perf_counter() - began < budget):
                start = time.perf_counter()
                run(size)
                times.append(time.perf_counter() - start)
            sizes.append(size)
            seconds.append(min(times))
            size = min(2 * size, most)
        return cls(sizes, seconds)


class Costs(NamedTuple):
    """Of a step of the target, and of one of the draft engine where there is one, by sequences.

    at_once: all guesses of a chain or a tree are one step of the draft engine (Medusa).
    """

    target: Curve
    draft: Curve | None = None
    at_once: bool = False

    def drafting(self, nums: Sequence[int], depth: int) -> float:
        """Seconds to guess so many tokens for each request; of more than `depth`, as a tree that deep."""
        if not self.draft or not nums:
            return 0.0
        if self.at_once:
            return self.draft(sum(num > 0 for num in nums))
        sizes = [0] * min(max(nums), depth)  # sequences and nodes of each of its steps
        for num, count in Counter(nums).items():
            wide = run_of_level(num, depth) if num > depth else 1
            for i in range(min(num, depth)):
                sizes[i] += count * (wide if i else 1)
        return sum(map(self.draft, sizes))


def run_of_level(nodes: int, depth: int) -> int:
    """Nodes of a level that a draft engine runs for a tree: those of all levels have room where its nodes will be."""
    return max(1, min(MAX_BRANCHES, (nodes - 1) // max(1, depth - 1)))


def scratch_step(size: int, width: int) -> dict[str, torch.Tensor]:
    """The inputs of a step of `size` sequences with a token each and `width` pages, all of them the scratch page."""
    import torch

    arrays = {
        names.TOKENS: np.zeros(size), names.POSITIONS: np.zeros(size), names.SLOTS: np.zeros(size),
        names.QUERY_START: np.arange(size + 1), names.KV_LEN: np.full(size, width),
        names.PAGES: np.zeros((size, width)), names.LOGIT_ROWS: np.arange(size),
    }  # fmt: skip
    return {name: torch.from_numpy(array.astype(np.int32)) for name, array in arrays.items()}
