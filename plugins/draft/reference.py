"""What `Draft` computes, in plain Python over lists: one request at a time, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """A request's share of the draft engine's step: the last of `tokens` wants logits."""

    tokens: list[int]
    positions: list[int]
    kv_len: int


def first_step(tokens: Sequence[int], kv_len: int, sampled: Sequence[int]) -> Share:
    """tokens: of the request's share of the target's step, the drafts last; sampled: one for each draft and one more.

    Up to the first sample that is not what was guessed they hold, that one included: the draft engine gets the last of
    them and the token before it, which it may not have seen.
    """
    drafts = tokens[len(tokens) - len(sampled) + 1 :]
    right = 0
    while right < len(drafts) and drafts[right] == sampled[right]:
        right += 1
    position = kv_len - len(sampled) + right
    before = tokens[len(tokens) - len(sampled) + right]
    return Share([before, sampled[right]], [position, position + 1], position + 2)


def next_step(guess: int, kv_len: int) -> Share:
    """The token guessed last, behind the `kv_len` keys that there are."""
    return Share([guess], [kv_len], kv_len + 1)
