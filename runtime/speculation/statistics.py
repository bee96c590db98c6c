"""What speculation has done so far, as counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeculationStats:
    """Counts since the engine opened.

    drafts: times that tokens of a request were drafted and verified. drafted, accepted: tokens of them.
    accepted_at: how often the first, second, .. token of a draft was accepted. steps: steps that verified drafts;
    all_steps: steps that sampled. Of a tree, the tokens of a depth are at one place.
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    steps: int = 0
    all_steps: int = 0

    @property
    def mean_length(self) -> float | None:
        """Tokens that a request gained where it was verified, the one that needs no draft included."""
        return 1 + self.accepted / self.drafts if self.drafts else None

    @property
    def share(self) -> float | None:
        """Of all steps that sampled, how many verified drafts."""
        return self.steps / self.all_steps if self.all_steps else None
