"""What `Draft` computes, in plain Python over lists: one request at a time, nothing padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """A request's share of the draft engine's step: the last of `tokens` wants logits."""

    tokens: list[int]
    positions: list[int]
    kv_len: int


def first_step(tokens: Sequence[int], kv_len: int, sampled: Sequence[int], parents: Sequence[int] = ()) -> Share:
    """tokens: of the request's share of the target's step, the drafts last; sampled: one for each draft and one more.
    parents: of the drafts, where they are a tree; -1: the token before them.

    Up to the first sample that is not what was guessed they hold, that one included: the draft engine gets the last of
    them and the token before it, which it may not have seen.
    """
    begin = len(tokens) - len(sampled)
    last, right = follow(tokens[begin + 1 :], sampled, parents or range(-1, len(sampled) - 2))
    position = kv_len - len(sampled) + right
    return Share([tokens[begin + last], sampled[last]], [position, position + 1], position + 2)


def path_step(
    tokens: Sequence[int], kv_len: int, sampled: Sequence[int], parents: Sequence[int], count: int
) -> tuple[Share, int]:
    """As `first_step`, from the token that the first sample follows to the last one sampled, which comes again up to
    `count` tokens -> the share, and which of its tokens wants logits."""
    begin = len(tokens) - len(sampled)
    last, right = follow(tokens[begin + 1 :], sampled, parents)
    path, node = [], last
    while node:
        path.append(tokens[begin + node])
        node = parents[node - 1] + 1
    held = [tokens[begin], *reversed(path)]
    root = kv_len - len(sampled)
    held += [sampled[last]] * (count - len(held))
    return Share(held, list(range(root, root + count)), root + count), right + 1


def follow(drafts: Sequence[int], sampled: Sequence[int], parents: Sequence[int]) -> tuple[int, int]:
    """(the last of the samples that holds, how many drafts are before it); the sample after draft i is number i + 1."""
    last = right = 0
    for i, (draft, parent) in enumerate(zip(drafts, parents, strict=True)):
        if parent + 1 == last and sampled[last] == draft:
            last, right = i + 1, right + 1
    return last, right


def next_step(guess: int, length: int) -> Share:
    """The token guessed last, behind the `length` positions that are right."""
    return Share([guess], [length], length + 1)
