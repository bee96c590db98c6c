"""What a row of the scheduler is to be sampled by, as batches carry it to any executor's sampler."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .request import SamplingParams


@dataclass(frozen=True)
class Placement:
    """A request takes a row: what sampling it needs. `tokens` may be left empty where `needs_history` is false."""

    row: int
    params: SamplingParams
    seed: int
    num_prompt: int
    stop_ids: Collection[int] = ()  # masked for the first `min_tokens` outputs
    tokens: Sequence[int] = ()  # prompt and the output so far


def needs_history(params: SamplingParams) -> bool:
    """Whether the sampler has to count tokens for this request."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
