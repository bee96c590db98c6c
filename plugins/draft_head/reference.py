"""What `DraftHead` computes, in plain Python over lists: one request at a time, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """A request's share of the head's step. At each position is the token behind it; number `row` wants logits, and
    `length` positions are right: where the next step goes on."""

    tokens: list[int]
    positions: list[int]
    kv_len: int
    row: int
    length: int


def first_step(tokens: Sequence[int], kv_len: int, sampled: Sequence[int]) -> Share:
    """tokens: of the request's share of the target's step, the drafts last; sampled: one for each draft and one more.

    Up to the first sample that is not what was guessed they hold, that one included. The head is given all of them, one
    position earlier than the target will have them: at the positions where the target was sampled from and whose states
    it left. What is behind the last that holds is seen by none before it, and written again.
    """
    num = len(sampled)
    drafts = tokens[len(tokens) - num + 1 :]
    right = 0
    while right < len(drafts) and drafts[right] == sampled[right]:
        right += 1
    start = kv_len - num
    return Share(list(sampled), list(range(start, kv_len)), kv_len, right, start + right + 1)


def next_step(guess: int, length: int, token_ids: Sequence[int]) -> Share:
    """The guess, one of the head's own vocabulary, behind the `length` positions that are right."""
    return Share([token_ids[guess]], [length], length + 1, 0, length + 1)
