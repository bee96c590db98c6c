"""Whether the tactics of a site compute the same, so that a kernel which was compiled wrongly is found at the build.

The fastest few run on the same operands. They differ by the order of their sums and by roundings on the way, which is
little beside the numbers of a row; wrong code is off by as much as the numbers themselves. What the majority finds is
taken to be right: each tactic is tested against the op's reference, but not as this machine compiles it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COMPARED = 5  # the fastest: an odd number
BOUND = 1 / 16  # of a number and of its row's root mean square, between two tactics
STEP = 1 / 4  # the same of FP8, whose numbers are an eighth apart
LARGEST = 1e18  # what is larger, infinity too, counts as that, and so does a quarter of the type's largest

Outputs = Sequence[np.ndarray]  # [rows, columns] each


def strangers(found: Sequence[Outputs]) -> set[int] | None:
    """Which of several tactics to leave out, by what they computed; None: no majority agrees.

    Those are the ones without a number where another has one, and those that differ from what most others found.
    """
    without = [[np.isnan(_numbers(output)) for output in outputs] for outputs in found]
    least = [np.logical_and.reduce(each) for each in zip(*without, strict=True)]
    sound = [i for i, each in enumerate(without) if all(map(np.array_equal, each, least))]
    for i in sound:
        mates = [j for j in sound if all(map(alike, found[i], found[j]))]
        if 2 * len(mates) > len(sound):
            return set(range(len(found))) - set(mates)
    return None


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two outputs [rows, columns] of a type are equal up to roundings."""
    return distance(one, other) <= 1


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far two outputs [rows, columns] of a type are apart, in parts of what is let pass.

    Of integers of 8 bits that is one more, of other integers nothing. Where neither has a number they are equal.
    """
    integers, wide = one.dtype.kind in "iu", one.itemsize > 1
    if integers and wide:
        return 0.0 if np.array_equal(one, other) else np.inf
    a, b = (np.nan_to_num(_numbers(each), nan=0.0) for each in (one, other))
    size = np.minimum(*(np.abs(each) + np.sqrt(np.square(each).mean(1, keepdims=True)) for each in (a, b)))
    allowed = (BOUND if integers or wide else STEP) * size + integers
    apart = np.abs(a - b)
    return float(np.divide(apart, allowed, out=np.where(apart > 0, np.inf, 0.0), where=allowed > 0).max())


def _numbers(output: np.ndarray) -> np.ndarray:
    """In fp32, none so large that its square is none."""
    import ml_dtypes

    if output.dtype.kind in "iu":
        return output.astype(np.float32)
    most = min(LARGEST, float(ml_dtypes.finfo(output.dtype).max) / 4)
    return output.astype(np.float32).clip(-most, most)
