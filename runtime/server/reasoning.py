"""`<think>..</think>` at the beginning of an answer: what the model says to itself, apart from what it says.

Text comes in pieces of any size and what is certain goes out at once, so a tag may be cut anywhere. Templates of models
that always reason write the opening tag themselves; the answer then begins inside. Invariant: the pieces put together
do not depend on how the text was cut.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Piece(NamedTuple):
    """Text of one of the two kinds."""

    kind: Literal["reasoning", "content"]
    text: str


class ReasoningReader:
    """Splits one answer. `begun`: the prompt ends with the opening tag.

    An answer cut off before the closing tag is all reasoning. Line ends around the reasoning belong to the tags.
    """

    def __init__(self, begun: bool = False):
        self._held = ""
        self._begun, self._inside, self._over = begun, False, False
        self._said = False  # in the present part: leading line ends are dropped before that

    def push(self, text: str, final: bool = False) -> list[Piece]:
        """What is certain now; with `final`, all of it."""
        self._held += text
        pieces: list[Piece] = []
        if not (self._inside or self._over):
            self._enter(final)
        if self._inside:
            before, tag, after = self._held.partition(CLOSE)
            if tag:
                self._held = before
                self._say(pieces, "reasoning", before.rstrip("\n"))
                self._inside, self._over, self._said, self._held = False, True, False, after
            else:
                keep = 0 if final else overlap(before, CLOSE)
                self._say(pieces, "reasoning", before[: len(before) - keep].rstrip("\n"))
        if self._over:
            self._say(pieces, "content", self._held)
        return pieces

    def _enter(self, final: bool) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._inside, self._held = True, start[len(OPEN) :]
        elif OPEN.startswith(start) and not final:
            return
        elif self._begun:
            self._inside = True
        else:
            self._over = self._said = True  # no reasoning: the text is left as it is

    def _say(self, pieces: list[Piece], kind: Literal["reasoning", "content"], text: str) -> None:
        rest = self._held[len(text) :]
        if not self._said:
            text = text.lstrip("\n")
        self._held = rest
        if text:
            self._said = True
            pieces.append(Piece(kind, text))


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag` and is not all of it."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
