"""The sampler: logits of a mixed batch -> one token per row, each row by its own request's parameters.

Parameters are columns indexed by row; they change only when a row gets a new request, and a step touches only the
stages that some row of it needs (all greedy: one argmax). The order is vLLM's: logprobs of the raw logits; then masks,
bias, min_tokens, penalties, temperature, min_p, top_k, top_p, draw. Counts for penalties are kept here, step by step,
so sampling never waits for the host. Invariant: a row's token depends on its logits, request and position alone; so
drafts (`speculation/verify.py`) are verified by sampling at each of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .distribution import cutoffs, draw, penalise, uniforms
from .placement import Placement, needs_history
from .request import Logprob
from .speculation.verify import Nodes, depths, holding

RANDOM, TRUNCATE, PENALTY, BIAS, MIN_TOKENS, LOGPROBS = (1 << i for i in range(6))


class Sampler:
    """Sampling state of `num_rows` rows over a vocabulary of `vocab_size`. One thread uses it, in step order."""

    def __init__(self, num_rows: int, vocab_size: int):
        self.vocab_size = vocab_size
        self._flags = np.zeros(num_rows, np.int64)
        self._temperature = np.ones(num_rows, np.float32)
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.ones(num_rows, np.float64)
        self._min_p = np.zeros(num_rows, np.float64)
        self._seed = np.zeros(num_rows, np.uint64)
        self._penalties = np.zeros((num_rows, 3), np.float32)  # repetition, presence, frequency
        self._min_length = np.zeros(num_rows, np.int64)  # stop ids are masked at positions below this
        self._num_logprobs = np.zeros(num_rows, np.int64)
        self._stop_ids: dict[int, torch.Tensor] = {}
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # row -> token ids, what is added
        # as many rows as penalties have needed so far: a large vocabulary costs memory only where it is asked for
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool)
        self._counts = torch.zeros(0, vocab_size)

    @torch.inference_mode()
    def place(self, placement: Placement) -> None:
        """A row gets a new request, or one that comes back after preemption."""
        row, params = placement.row, placement.params
        flags = 0
        if params.temperature > 0:
            flags |= RANDOM
            self._temperature[row] = max(params.temperature, 1e-30)  # float32 has no smaller one that divides well
            self._top_k[row], self._top_p[row], self._min_p[row] = params.top_k, params.top_p, params.min_p
            self._seed[row] = np.uint64(placement.seed % (1 << 64))
            if 0 < params.top_k < self.vocab_size or params.top_p < 1 or params.min_p > 0:
                flags |= TRUNCATE
        if needs_history(params):
            flags |= PENALTY
            self._penalties[row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            self._count(row, placement)
        if params.logit_bias:
            flags |= BIAS
            ids = torch.tensor(list(params.logit_bias.keys()))
            self._bias[row] = ids, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        if params.min_tokens and placement.stop_ids:
            flags |= MIN_TOKENS
            self._min_length[row] = placement.num_prompt + params.min_tokens
            self._stop_ids[row] = torch.tensor(sorted(placement.stop_ids))
        if params.logprobs is not None:
            flags |= LOGPROBS
            self._num_logprobs[row] = params.logprobs
        self._flags[row] = flags

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        masks: Sequence[tuple[int, np.ndarray]] = (),
        drafts: np.ndarray | None = None,
        nodes: Nodes | None = None,
    ) -> tuple[np.ndarray, list[dict[int, Logprob] | None] | None]:
        """logits [R, V] (may be overwritten), rows [R], positions [R] of the new tokens -> tokens [R] int32, logprobs.

        masks: (row of logits, bits of the tokens that may be sampled). drafts, or nodes: see `verify.py`; where there
        are any, rows has an entry for each sample, and a sample is drawn as if the drafts before it were right.
        The second result is None if no row asked for logprobs, else one dictionary per row (None where not asked).
        """
        row_flags = self._flags[rows]
        flags = int(np.bitwise_or.reduce(row_flags, initial=0))
        if not flags and not masks:
            return logits.argmax(-1).numpy().astype(np.int32), None
        logits = logits.float()
        asked = np.flatnonzero(row_flags & LOGPROBS)
        raw = logits[asked] if flags & LOGPROBS else None
        for i, mask in masks:
            bits = np.unpackbits(mask.view(np.uint8), count=self.vocab_size, bitorder="little")
            logits[i].masked_fill_(torch.from_numpy(bits == 0), -torch.inf)
        if flags & BIAS:
            for i in np.flatnonzero(row_flags & BIAS):
                ids, amounts = self._bias[int(rows[i])]
                logits[i].index_add_(0, ids, amounts)
        if flags & MIN_TOKENS:
            for i in np.flatnonzero((row_flags & MIN_TOKENS != 0) & (positions < self._min_length[rows])):
                logits[i].index_fill_(0, self._stop_ids[int(rows[i])], -torch.inf)
        if flags & PENALTY:
            some = np.flatnonzero(row_flags & PENALTY)
            self._penalise(logits, some, rows[some], None if drafts is None else drafts[some], nodes)
        tokens = self._pick(logits, row_flags, flags, rows, positions)
        if flags & PENALTY:
            if drafts is not None:
                some = some[holding(tokens, drafts, nodes)[some]]
            index = torch.from_numpy(rows[some].astype(np.int64)), torch.from_numpy(tokens[some].astype(np.int64))
            self._counts.index_put_(index, torch.ones(len(some)), accumulate=True)
        if raw is None:
            return tokens, None
        found = top_logprobs(raw, torch.from_numpy(tokens[asked]), self._num_logprobs[rows[asked]])
        logprobs: list[dict[int, Logprob] | None] = [None] * len(rows)
        for i, entry in zip(asked, found, strict=True):
            logprobs[i] = entry
        return tokens, logprobs

    def _pick(
        self, logits: torch.Tensor, row_flags: np.ndarray, flags: int, rows: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        random = np.flatnonzero(row_flags & RANDOM)
        if len(random) == len(rows):
            return self._draw(logits, flags, rows, positions)
        tokens = logits.argmax(-1).numpy().astype(np.int32)
        if len(random):
            tokens[random] = self._draw(logits[random], flags, rows[random], positions[random])
        return tokens

    def _draw(self, logits: torch.Tensor, flags: int, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        temperature = torch.from_numpy(self._temperature[rows]).unsqueeze(1)
        # the maximum goes first: a tiny temperature then gives 0 and -inf, not inf - inf
        logits = (logits - logits.amax(-1, keepdim=True)).div_(temperature)  # [R, V]
        weights = logits.exp()
        if flags & TRUNCATE:
            cut = cutoffs(logits, weights, self._top_k[rows], self._top_p[rows], self._min_p[rows])
            weights.masked_fill_(logits < cut, 0)
        return draw(weights, uniforms(self._seed[rows], positions)).numpy().astype(np.int32)

    def _penalise(
        self, logits: torch.Tensor, some: np.ndarray, rows: np.ndarray, drafts: np.ndarray | None, nodes: Nodes | None
    ) -> None:
        repetition, presence, frequency = torch.from_numpy(self._penalties[rows]).split(1, dim=1)
        index = torch.from_numpy(rows.astype(np.int64))
        counts = self._counts[index]  # a copy [R, V]
        if nodes is not None:  # a sample counts the drafts before it
            for at, token in nodes.before(some):
                counts[at, token] += 1
        elif drafts is not None:
            depth = depths(drafts)
            for back in range(1, int(depth.max(initial=0)) + 1):
                deep = np.flatnonzero(depth >= back)
                counts[deep, drafts[deep - back]] += 1
        logits[some] = penalise(logits[some], self._in_prompt[index], counts, repetition, presence, frequency)

    def _count(self, row: int, placement: Placement) -> None:
        missing = row + 1 - len(self._counts)
        if missing > 0:
            missing = min(max(missing, len(self._counts)), len(self._flags) - len(self._counts))
            self._in_prompt = torch.cat((self._in_prompt, self._in_prompt.new_zeros(missing, self.vocab_size)))
            self._counts = torch.cat((self._counts, self._counts.new_zeros(missing, self.vocab_size)))
        prompt, output = placement.tokens[: placement.num_prompt], placement.tokens[placement.num_prompt :]
        self._in_prompt[row].zero_()[torch.tensor(prompt, dtype=torch.int64)] = True
        self._counts[row] = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=self.vocab_size)


def top_logprobs(logits: torch.Tensor, chosen: torch.Tensor, num: np.ndarray) -> list[dict[int, Logprob]]:
    """Log-probabilities of the `num[i]` best tokens and of the chosen one: logits [R, V], chosen [R], num [R].

    The chosen token comes first; a rank counts the tokens that are strictly more likely, plus one.
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = chosen.long().unsqueeze(1)
    value = logprobs.gather(1, chosen)  # [R, 1]
    rank = (logprobs > value).sum(-1) + 1
    width = min(int(num.max(initial=0)), logits.shape[1])
    best = logprobs.topk(width)
    rows = zip(
        chosen[:, 0].tolist(), value[:, 0].tolist(), rank.tolist(),
        best.indices.tolist(), best.values.tolist(), num.tolist(), strict=True,
    )  # fmt: skip
    found = []
    for token, logprob, place, ids, values, k in rows:
        entry = {token: Logprob(logprob, place)}
        for i in range(min(k, width)):
            entry.setdefault(ids[i], Logprob(values[i], i + 1))
        found.append(entry)
    return found
