"""Heads that draft from the target's hidden states (EAGLE-1, EAGLE-3, Medusa), on the target's GPU and stream.

A head is a draft engine that reads more: what it makes at a position follows from the target's states there and from
the token behind. The states lie in pools by slot, like KV, written by the target's steps. All samples of a request's
share go into the first step, shifted by one, so what the target has verified is seen here without asking the host; from
its own states, which it goes on from in the next steps, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from ...engines.dtypes import DTYPES
from ...engines.plan import FIRST, GROW, OWN, POOL, TARGET, Plan, keep, move
from ...engines.sampling import SAMPLED
from ...engines.step import DRAFTED, TOKEN_IDS, hidden_states
from ...plugins.gpu import Gpu
from ..batch import Batch
from ..capacity import ServeConfig
from ..engine import Engine
from ..speculation.pairing import check_drafter
from ..speculation.tree import Tree, product
from .drafting import BRANCHES, GREEDY, Drafting, Level


def open_drafting(gpu: Gpu, target: Engine, plan: Plan, config: ServeConfig, stream: int) -> Drafting:
    """What drafts for `target`, whose plan is given. Raises EngineError: no engine there, or of no use for `target`."""
    assert config.draft_engine is not None
    engine = Engine.open(config.draft_engine, dummy=config.load_format == "dummy")
    check_drafter(target, engine, config)
    head = engine.manifest.head
    kind = Drafting if head is None else MedusaDrafting if head.kind == "medusa" else HeadDrafting
    return kind(gpu, engine, plan, config, stream)


class HeadDrafting(Drafting):
    """An EAGLE head."""

    lag = 1
    path = FIRST  # which follows what was sampled anyway
    level = (GROW, f"{OWN}body", f"{OWN}head")

    def __init__(self, gpu: Gpu, engine: Engine, target: Plan, config: ServeConfig, stream: int):
        super().__init__(gpu, engine, target, config, stream)
        assert engine.manifest.head
        self._layers = engine.manifest.head.reads
        states = [hidden_states(layer) for layer in sorted(set(self._layers))]
        self.keeps, self.moves = tuple(map(keep, states)), tuple(map(move, states))

    @property
    def buffer_bytes(self) -> int:
        return super().buffer_bytes + self._drafted_bytes

    @property
    def _drafted_bytes(self) -> int:
        """Of its own states, a row for each row of logits."""
        model = self.engine.manifest.model
        return max(bucket.rows for bucket in self.plan.buckets) * model.hidden_size * DTYPES[model.dtype].itemsize

    @cached_property
    def _token_ids(self) -> np.ndarray:
        """The target's token of each guess."""
        ids = np.empty(self.plan.vocab_size, np.int32)
        self._gpu.download(ids, self.weights.addresses[TOKEN_IDS], self._stream)
        self._gpu.synchronise(self._stream)
        return ids

    def _reads(self, buffers: Mapping[str, int]) -> dict[str, int]:
        pools = {f"{TARGET}{POOL}{i}": buffers[hidden_states(layer)] for i, layer in enumerate(self._layers)}
        drafted = self._gpu.allocate(self._drafted_bytes, "the states of the head")
        return super()._reads(buffers) | pools | {DRAFTED: drafted}

    def _first(self, samples: np.ndarray, path: bool) -> tuple[int, int]:
        return int(samples.sum()), max(2, int(samples.max()))  # never a bucket for decoding

    def _tokens(self, guesses: np.ndarray) -> np.ndarray:
        return self._token_ids[guesses]

    def _before_first(self, kv_len: np.ndarray, samples: np.ndarray, path: bool) -> np.ndarray:
        return kv_len - samples

    def _seen_after(self, newest: np.ndarray, steps: int) -> np.ndarray:
        return newest


class MedusaDrafting(HeadDrafting):
    """Medusa heads: all guesses at once, from the target's state at the token before the newest, and no keys."""

    def __init__(self, gpu: Gpu, engine: Engine, target: Plan, config: ServeConfig, stream: int):
        super().__init__(gpu, engine, target, config, stream)
        self._most = min(self._most, self.at_once)
        self._run = self.at_once if self._nodes else 0  # rows of a sequence

    def scratch(self, size: int) -> None:
        """Without sampling, which staging prepares for one guess of a row."""
        self._scratch(size, "head")

    def _catch_up(self, batch: Batch, path: bool) -> None:
        """There is nothing to have seen."""

    def _guess(self, first: int, part: str, later: int, num: int, steps: int) -> np.ndarray:
        """All of a sequence lie behind one another."""
        self._graphs.replay(first, FIRST, "body", "head", GREEDY)
        found = self._guesses.reshape(-1)[: num * self.at_once]
        self._gpu.download(found, self._buffers[SAMPLED], self._stream)
        return found.reshape(num, self.at_once).T[:steps]

    def _grow(self, first: int, level: int, num: int, steps: int) -> list[Level]:
        self._graphs.replay(first, FIRST, "body", "head", BRANCHES)
        return [self._tell(0, num * self.at_once)]

    def _trees(self, levels: Sequence[Level], num: int) -> list[Tree]:
        tokens, chances = (part.reshape(num, self.at_once, -1)[:, : self._most] for part in levels[0])
        return [product(*each, self._nodes) for each in zip(tokens, chances, strict=True)]
