"""What `DraftHead` computes, in plain Python over lists: one request at a time, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """A request's share of the head's step. At each position is the token behind it; number `row` wants logits, and
    `length` positions are right: where the next step goes on. states: the target's keys at which it left them."""

    tokens: list[int]
    positions: list[int]
    kv_len: int
    row: int
    length: int
    states: Sequence[int] = ()


def first_step(tokens: Sequence[int], kv_len: int, sampled: Sequence[int], parents: Sequence[int] = ()) -> Share:
    """tokens: of the request's share of the target's step, the drafts last; sampled: one for each draft and one more.
    parents: of the drafts, where they are a tree; -1: the token before them.

    Up to the first sample that is not what was guessed they hold, that one included. The head is given these, one
    position earlier than the target will have them: where the target was sampled from and whose states it left. What is
    behind the last that holds, as many tokens as there are samples, is seen by none before it, and written again.
    """
    num = len(sampled)
    drafts, held, last, start = tokens[len(tokens) - num + 1 :], [sampled[0]], 0, kv_len - num
    states = list(range(start, kv_len))
    for i, (draft, parent) in enumerate(zip(drafts, parents or range(-1, num - 2), strict=True)):
        if parent + 1 == last and sampled[last] == draft:
            last = i + 1
            states[len(held)] = start + last
            held.append(sampled[last])
    right = len(held) - 1
    held += [sampled[0]] * (num - len(held))
    return Share(held, list(range(start, kv_len)), kv_len, right, start + right + 1, states)


def next_step(guess: int, length: int, token_ids: Sequence[int]) -> Share:
    """The guess, one of the head's own vocabulary, behind the `length` positions that are right."""
    return Share([token_ids[guess]], [length], length + 1, 0, length + 1)
