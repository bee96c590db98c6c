"""Suffix lookup: what most often followed the last tokens, in this request and in all answers of the session.

After SuffixDecoding (Oliaro et al., arXiv:2411.04975). Instead of suffix trees: the tokens that followed each context
of up to `DEPTH` tokens, with counts. A guess goes on while what followed was likely, so drafts are long where answers
repeat and short where they do not. Answers of requests that share no prefix cache are not looked up for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..request import Request

DEPTH = 8  # tokens of a context at most
SHORTEST = 2  # below this a context says little
LEAST = 0.1  # a draft ends where the chance that all of it is right, by the counts, falls below this
MOST_CONTEXTS = 1 << 19  # in memory for each of two generations: about 250 MB both
Counts = dict[tuple[int, ...], dict[int, int]]


class Followers:
    """Context -> token that followed -> how often. When full, the contexts of the generation before last are lost."""

    def __init__(self, most: int):
        self._most = most
        self._new: Counts = {}
        self._old: Counts = {}

    def learn(self, tokens: Sequence[int], begin: int, end: int) -> None:
        """Tokens `begin .. end` follow those before them."""
        for at in range(max(begin, SHORTEST), end):
            token = tokens[at]
            for n in range(SHORTEST, min(DEPTH, at) + 1):
                followers = self._new.setdefault(tuple(tokens[at - n : at]), {})
                followers[token] = followers.get(token, 0) + 1
        if len(self._new) > self._most:
            self._old, self._new = self._new, {}

    def best(self, context: tuple[int, ...]) -> tuple[int, int, float] | None:
        """(length of the longest context known, its likeliest follower, the share of it), None if none is known."""
        for n in range(min(DEPTH, len(context)), SHORTEST - 1, -1):
            found = self._new.get(context[-n:]) or self._old.get(context[-n:])
            if found:
                token = max(found, key=found.__getitem__)
                return n, token, found[token] / sum(found.values())
        return None


class SuffixDrafter:
    """Counts of each request's own text, and of all answers so far for each salt of the prefix cache."""

    ahead = False

    def __init__(self, most_contexts: int = MOST_CONTEXTS):
        self._most = most_contexts
        self._own: dict[Request, Followers] = {}
        self._known: dict[Request, tuple[int, int]] = {}  # tokens looked at: for the request, for all
        self._answers: dict[bytes, Followers] = {}

    def propose(self, request: Request, most: int) -> Sequence[int]:
        self._learn(request, own=True)
        own, answers = self._own[request], self._answers.get(request.salt)
        context, chance = tuple(request.tokens[-DEPTH:]), 1.0
        drafts: list[int] = []
        while len(drafts) < most:
            found = own.best(context)
            other = answers.best(context) if answers else None
            if other and (not found or other[0] > found[0]):
                found = other
            if not found or (chance := chance * found[2]) < LEAST:
                break
            drafts.append(found[1])
            context = (*context[-DEPTH + 1 :], found[1])
        return drafts

    def end(self, request: Request) -> None:
        self._learn(request, own=False)
        self._own.pop(request, None)
        del self._known[request]

    def _learn(self, request: Request, own: bool) -> None:
        """Up to the newest token; a request's own text only where it is about to be looked up."""
        tokens, end = request.tokens, len(request.tokens)
        mine, shared = self._known.get(request, (0, request.num_prompt))
        if own and mine < end:
            self._own.setdefault(request, Followers(self._most)).learn(tokens, mine, end)
            mine = end
        if request.params.prefix_cache and shared < end:
            self._answers.setdefault(request.salt, Followers(self._most)).learn(tokens, shared, end)
        self._known[request] = mine, end
