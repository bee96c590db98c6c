"""Heads that draft from the target's hidden states (EAGLE-1, EAGLE-3): draft engines with one more input. And Medusa.

What it makes at position t follows from the target's states there and from the token at t + 1, so it is one position
behind. The states lie in a pool by slot, like KV: whatever the head lags behind, finds in the prefix cache or makes
anew after a preemption is there. From its own states nothing is kept: what it made of them is made again when the
target has said its own. The last slot of a page that rows share holds what the row that came last made of its token:
a guess may be the worse for it, never an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...engines import step as names
from ..batch import Batch
from .costs import scratch_step
from .draft_engine import DraftEngine
from .tree import product


class HeadEngine(DraftEngine):
    """Used as `DraftEngine`.

    states [num_slots, width]: pool of what the head reads. reads: names of the target's outputs that lie side by side
    in it. token_ids [draft vocabulary]: the target's tokens. hidden_size: of the head's own state. bias [hidden_size]:
    of what makes one of the target's states, and so not for the head's own, though the graph adds it to either.
    """

    lag = 1

    def __init__(
        self, *engine: Any, states: torch.Tensor, reads: Sequence[str], token_ids: np.ndarray, hidden_size: int,
        bias: torch.Tensor | None = None,
    ):  # fmt: skip
        super().__init__(*engine)
        self._states, self._reads, self._token_ids = states, tuple(reads), token_ids
        self._hidden_size, self._bias = hidden_size, bias

    def keep(self, batch: Batch, outputs: Mapping[str, torch.Tensor]) -> None:
        slots, begin = torch.from_numpy(batch.inputs[names.SLOTS]).long(), 0
        for name in self._reads:
            some = outputs[name]
            self._states[:, begin : begin + some.shape[1]].index_copy_(0, slots, some)
            begin += some.shape[1]

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        super().move(source, target)
        self._states[torch.from_numpy(target).long()] = self._states[torch.from_numpy(source).long()]

    def time(self, size: int) -> None:
        state = torch.zeros(size, self._hidden_size, dtype=self._states.dtype)
        self.graph({**scratch_step(size, 4), **self._beside(np.zeros(size, np.int32), state), **self.pools})

    def _seen_after(self, ends: np.ndarray, nums: np.ndarray) -> np.ndarray:
        return ends - 1

    def _beside(self, slots: np.ndarray, state: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        if state is not None:
            features = self._states.new_zeros(len(slots), self._states.shape[1])
            return {names.FEATURES: features, names.DRAFTED: state if self._bias is None else state - self._bias}
        drafted = self._states.new_zeros(len(slots), self._hidden_size)
        return {names.FEATURES: self._states[torch.from_numpy(slots).long()], names.DRAFTED: drafted}

    def _likeliest(self, logits: torch.Tensor) -> np.ndarray:
        return self._token_ids[logits.argmax(-1).numpy()]

    def _best(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        chances, tokens = super()._best(logits)
        return chances, self._token_ids[tokens]


class MedusaEngine(HeadEngine):
    """Medusa heads: all guesses at once, from the target's state at the token before the newest."""

    def time(self, size: int) -> None:
        self._logits(np.zeros(size, np.int64))

    def _guess(
        self, pages: np.ndarray, rows: np.ndarray, ends: np.ndarray, tokens: np.ndarray, nums: np.ndarray
    ) -> list[Sequence[int]]:
        page = pages[np.arange(len(pages)), (ends - 2) // self._page_size]
        logits = self._logits(self._slots(page, ends - 2))
        logits = logits.view(len(rows), -1, len(self._token_ids))  # [S, heads, V]
        chains: list[Sequence[int]] = [
            some[:num].tolist() for some, num in zip(self._likeliest(logits), nums, strict=True)
        ]
        if not (trees := self._wants_tree(nums)).any():
            return chains
        chances, tokens = self._best(logits[:, : self._depth])  # [S, heads, branches]
        for row in np.flatnonzero(trees):
            chains[row] = product(tokens[row], chances[row], self._nodes)
        return chains

    def _logits(self, slots: np.ndarray) -> torch.Tensor:
        states = self._states[torch.from_numpy(slots).long()]
        return self.graph({**scratch_step(len(slots), 1), names.FEATURES: states})[names.LOGITS]
