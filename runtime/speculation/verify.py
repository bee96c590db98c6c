"""Which samples of a verification step count.

A request's share ends with its last known token and the drafts, and each of these is sampled from. The sample after a
draft was drawn as if the draft were right; it counts only if all drafts before it are.
"""

from __future__ import annotations

import numpy as np


def holding(tokens: np.ndarray, drafts: np.ndarray) -> np.ndarray:
    """tokens [N] sampled, drafts [N] what was guessed for each, -1 for the last of a request -> bool [N].

    A request's samples follow one another: up to its first that is not what was guessed, that one included, they hold.
    """
    last = drafts < 0
    wrong = (tokens != drafts) & ~last
    before = np.cumsum(wrong) - wrong  # wrong guesses before each sample, of all requests
    first = np.concatenate(([True], last[:-1]))
    return before == np.maximum.accumulate(np.where(first, before, 0))


def depths(drafts: np.ndarray) -> np.ndarray:
    """drafts [N], see `holding` -> [N]: how many drafts of its request are before each sample."""
    at = np.arange(len(drafts))
    first = np.concatenate(([True], drafts[:-1] < 0))
    return at - np.maximum.accumulate(np.where(first, at, 0))
