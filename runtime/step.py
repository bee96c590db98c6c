"""What the scheduler hands to the executor (`Step` of `Work`) and to the user (`Delta`).

Named tuples, not dataclasses: they are made for every request in every step, at 0.3 us against 0.9.
Invariant: a step is read (`Batch.fill`) before anything is committed, so `Work.request` still is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from .request import FinishReason, Request
from .speculation.statistics import SpeculationStats

FROM_DEVICE = -1  # a token still in flight: the executor takes it from last_token[row]


class Work(NamedTuple):
    """One request's share of a step: its tokens `start .. start + num_tokens`.

    The last `num_logits` of them want logits; the last `num_samples` of those are sampled from, those before are scored
    for `prompt_logprobs`. `pages` is the request's own list, append-only while it has its row. `fresh`: the first work
    since it got the row, whose state is to be made anew. `drafts`: guesses of its next tokens, the last of its share;
    each of them is sampled from as well (`num_samples` is one more). `num_ahead`: tokens that the executor is to draft
    once this step's are known.
    """

    request: Request
    row: int
    start: int
    num_tokens: int
    num_logits: int
    pages: list[int]
    num_samples: int = 0
    fresh: bool = False
    drafts: Sequence[int] = ()
    num_ahead: int = 0

    @property
    def kv_len(self) -> int:
        return self.start + self.num_tokens

    @property
    def tokens(self) -> list[int]:
        """[num_tokens]; only the last one can be in flight."""
        known = self.request.tokens[self.start : self.kv_len]
        known += self.drafts
        return known + [FROM_DEVICE] * (self.num_tokens - len(known))


Step: TypeAlias = tuple[Work, ...]


class Delta(NamedTuple):
    """What a commit adds to one request. `logprobs`: an entry per token; `prompt_logprobs`: one per position scored.
    `stop_reason` of one that ends with "error" by its own fault: the sentence."""

    request_id: str
    token_ids: list[int]
    logprobs: Sequence[Any] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Sequence[Any] | None = None


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot; counts since the start. The scratch page is left out; prefix tokens count first admissions only."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_held_pages: int
    num_cached_pages: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    num_preemptions: int
    num_evictions: int
    speculation: SpeculationStats = SpeculationStats()

    @property
    def kv_utilisation(self) -> float:
        """0 to 1: the share of pages that open requests hold."""
        return self.num_held_pages / self.num_pages
