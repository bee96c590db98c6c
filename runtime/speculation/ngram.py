"""Prompt lookup: what followed the last time that the request's last few tokens occurred in it.

Saxena, "Prompt lookup decoding" (2023). Good where answers repeat their prompt: editing, extraction, code.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..request import Request


class _Index:
    """Where each n-gram of a request was seen last."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that follows it
        self.known = 0  # tokens that were looked at


class NgramDrafter:
    """Looks for the longest of the last `longest` to `shortest` tokens that occurred before, the latest place first."""

    ahead = False

    def __init__(self, shortest: int = 2, longest: int = 4):
        self._shortest, self._longest = shortest, longest
        self._indexes: dict[Request, _Index] = {}

    def propose(self, request: Request, most: int) -> Sequence[int]:
        tokens, index = request.tokens, self._indexes.setdefault(request, _Index())
        end = len(tokens)
        for at in range(max(index.known, self._shortest), end):  # the n-grams before `at`, which has a follower
            for n in range(self._shortest, min(self._longest, at) + 1):
                index.after[tuple(tokens[at - n : at])] = at
        index.known = end
        for n in range(min(self._longest, end - 1), self._shortest - 1, -1):
            place = index.after.get(tuple(tokens[end - n :]))
            if place is not None:
                found = tokens[place : place + most]
                while len(found) < most:  # what overlaps the end goes on as it began
                    found.append(found[len(found) - (end - place)])
                return found
        return ()

    def end(self, request: Request) -> None:
        self._indexes.pop(request, None)
