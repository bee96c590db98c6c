"""What drafts: one protocol for those that look tokens up on the host and those whose model runs in the executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..capacity import ServeConfig
from ..request import Request
from .ngram import NgramDrafter
from .suffix import SuffixDrafter
from .tree import first


class Drafter(Protocol):
    """Guesses the next tokens of requests. Used by the loop's thread alone.

    ahead: the executor drafts, after a step and for the next one; `propose` hands on what came with its result.
    Guesses are a chain or, from the executor, a `Tree`.
    What was accepted of a draft is in `request.tokens`: a drafter that keeps an index of them brings it up to date.
    """

    ahead: bool

    def propose(self, request: Request, most: int) -> Sequence[int]:
        """At most so many guesses of what follows `request.tokens`, the first first; none where it has no idea."""
        ...

    def end(self, request: Request) -> None:
        """The request has ended."""
        ...


class EngineDrafter:
    """Hands on what a draft engine guessed in the executor (`draft_engine.py`)."""

    ahead = True

    def propose(self, request: Request, most: int) -> Sequence[int]:
        return first(request.drafts, most)

    def end(self, request: Request) -> None:
        """Nothing is kept here."""


def open_drafter(config: ServeConfig) -> Drafter:
    """The one that `config.speculate` names."""
    match config.speculate:
        case "ngram":
            return NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)
        case "suffix":
            return SuffixDrafter()
        case _:
            return EngineDrafter()
