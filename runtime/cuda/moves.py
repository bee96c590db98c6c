"""Drafts that held as a branch of a tree: what they left in pools moves to where a chain would lie.

Whoever verifies drafts waits for the result before the next step, so the moves are known when it is launched, and go in
front of it. The likeliest path of a tree is a chain, so most steps have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...engines.plan import MOVES, Plan
from ...plugins.gpu import Gpu
from ..batch import Batch
from ..executor import moved
from .graphs import Replays


class Moves:
    """Of the pools that `parts` of the plan's buckets move."""

    def __init__(
        self, gpu: Gpu, plan: Plan, buffers: Mapping[str, int], graphs: Replays, parts: Sequence[str], stream: int
    ):
        self._gpu, self._stream, self._graphs, self._parts = gpu, stream, graphs, tuple(parts)
        self._buckets = {b.sequences: i for i, b in reversed([*enumerate(plan.buckets)]) if MOVES in b.parts}
        self._most = max(self._buckets, default=0)
        self._address = buffers[MOVES]
        self._pinned = gpu.pinned(8 * plan.max_num_seqs).view(np.int32).reshape(-1, 2)
        self._due: list[np.ndarray] = []  # slots [M, 2]: from, to; each is done before the next

    def note(self, batch: Batch, tokens: np.ndarray) -> None:
        """The step is done, and `tokens` [N] were sampled."""
        if batch.nodes is None:
            return
        works, source, target = moved(batch, tokens)
        # a request's moves one after the other: a slot that one empties may be filled by the next
        rank = np.arange(len(works)) - np.searchsorted(works, works)
        slots = np.stack([source, target], 1)
        self._due = [slots[rank == i] for i in range(rank.max(initial=-1) + 1)]

    def launch(self) -> None:
        """Enqueues those that are due."""
        parts = [due[at : at + self._most] for due in self._due for at in range(0, len(due), self._most)]
        self._due = []
        for i, some in enumerate(parts):
            size = min(size for size in self._buckets if size >= len(some))
            if i:  # the buffer is still read
                self._gpu.synchronise(self._stream)
            self._pinned[:size] = -1
            self._pinned[: len(some)] = some
            self._gpu.upload(self._address, self._pinned[:size], self._stream)
            self._graphs.replay(self._buckets[size], *self._parts)
