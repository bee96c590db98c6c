"""Which samples of a verification step count.

A request's share ends with its last known token and the drafts, and each of these is sampled from. The sample after a
draft was drawn as if the draft, and those that it follows, were right; it counts only if they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .tree import parents_of


class Nodes(NamedTuple):
    """What was guessed, as trees; int32 by sample. Each sample is after the token of a row."""

    tokens: np.ndarray  # [N] of the row, a draft; -1: the last known token of its request
    parents: np.ndarray  # [N] sample of the row that the draft follows; -1 there

    @classmethod
    def of(cls, drafts: Sequence[Sequence[int]]) -> Nodes:
        """drafts: of each request that is sampled from."""
        tokens: list[int] = []
        places: list[int] = []  # of parents, among the drafts of their request
        begins: list[int] = []
        for some in drafts:
            begins.append(len(tokens))
            tokens += (-1, *some)
            places += (-1, *parents_of(some))
        sizes = np.diff(begins, append=len(tokens))
        parents = np.array(places, np.int32) + np.repeat(np.array(begins, np.int32) + 1, sizes)
        parents[begins] = -1
        return cls(np.array(tokens, np.int32), parents)

    def before(self, samples: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of (places in `samples`, a draft before each of them), until all drafts before all were told."""
        at = np.arange(len(samples))
        while (deep := self.parents[samples] >= 0).any():
            at, samples = at[deep], samples[deep]
            yield at, self.tokens[samples]
            samples = self.parents[samples]


def holding(tokens: np.ndarray, drafts: np.ndarray | None, nodes: Nodes | None = None) -> np.ndarray:
    """tokens [N] sampled, drafts [N] what was guessed for each, -1 for the last of a request -> bool [N].

    A request's samples follow one another: up to its first that is not what was guessed, that one included, they hold;
    all where nothing was guessed (None). nodes: instead of drafts; the samples along the path that holds.
    """
    if drafts is None:
        return np.ones(len(tokens), bool)
    if nodes is not None:
        held = nodes.parents < 0
        right = ~held & (tokens[nodes.parents] == nodes.tokens)
        while (more := right & ~held & held[nodes.parents]).any():
            held |= more
        return held
    last = drafts < 0
    wrong = (tokens != drafts) & ~last
    before = np.cumsum(wrong) - wrong  # wrong guesses before each sample, of all requests
    first = np.concatenate(([True], last[:-1]))
    return before == np.maximum.accumulate(np.where(first, before, 0))


def newest(works: np.ndarray, held: np.ndarray) -> np.ndarray:
    """works [N] of samples, held [N] -> [M]: of each work the last sample that holds."""
    holds = np.flatnonzero(held)
    return holds[np.append(works[holds][1:] != works[holds][:-1], True)[: len(holds)]]


def depths(drafts: np.ndarray) -> np.ndarray:
    """drafts [N], see `holding` -> [N]: how many drafts of its request are before each sample."""
    at = np.arange(len(drafts))
    first = np.concatenate(([True], drafts[:-1] < 0))
    return at - np.maximum.accumulate(np.where(first, at, 0))


def moves(held: np.ndarray, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """held [N] of trees -> samples whose rows are not where a chain would have them, and the rows that are: [M] each,
    of what holds; to be read before anything is written."""
    index = np.flatnonzero(held)
    roots = np.flatnonzero(nodes.parents[index] < 0)
    begin = np.repeat(roots, np.diff(np.append(roots, len(index))))
    to = index[begin] + np.arange(len(index)) - begin
    return index[index != to], to[index != to]
