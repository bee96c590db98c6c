"""What speculation learns while it serves: shares that forget, medians that follow, and what is known of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class Chance:
    """A share of successes that forgets, with a prior."""

    def __init__(self, memory: float, weight: float):
        self._memory, self._weight = memory, weight
        self._right = self._all = 0.0

    def count(self, right: int, tried: int) -> None:
        kept = self._memory**tried
        self._right, self._all = self._right * kept + right, self._all * kept + tried

    def fade(self, kept: float) -> None:
        """Less is known than before."""
        self._right, self._all = self._right * kept, self._all * kept

    def __call__(self, prior: float) -> float:
        return (self._right + self._weight * prior) / (self._all + self._weight)


class Median:
    """Of positive values, followed by steps of a share of it: a step of the engine that was disturbed counts once."""

    def __init__(self, value: float):
        self.value, self._num = value, 0

    def count(self, value: float) -> None:
        self._num += 1
        step = 1 + max(0.03, 0.3 / (1 + self._num))
        self.value = min(value, self.value * step) if value > self.value else max(value, self.value / step)


@dataclass(slots=True)
class Outlook:
    """What is known of a request. number: tokens to draft for it. hits: of steps, how many had a draft.

    reached: its length when a draft engine last guessed for it. shadow: guesses made only to see how good they are.
    right: of the next token of a chain. branched: of any node of a tree at the next place.
    """

    right: Chance
    branched: Chance
    hits: float
    number: int
    reached: int = 0
    shadow: Sequence[int] = ()
