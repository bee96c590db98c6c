"""Log-probabilities of scored prompt tokens, on the host and in numpy: torch would take seconds to load for them."""

from __future__ import annotations

import numpy as np

from ..request import Logprob


def top_logprobs(logits: np.ndarray, chosen: np.ndarray, num: int) -> list[dict[int, Logprob]]:
    """The `num` best tokens and the chosen one of each row: logits [R, V], chosen [R]; as `runtime.sampler` gives them.

    The chosen token comes first; a rank counts the tokens that are strictly more likely, plus one.
    """
    found = []
    for row, token in zip(logits, chosen.tolist(), strict=True):  # a row fits into the caches
        values = row.astype(np.float32)
        highest = values.max()
        shift = highest + np.log(np.exp(values - highest).sum(dtype=np.float64))  # logprob = logit - shift
        entry = {token: Logprob(float(values[token] - shift), int((values > values[token]).sum()) + 1)}
        width = min(num, len(values))
        if width:
            best = np.argpartition(values, len(values) - width)[-width:]
            best = best[np.argsort(-values[best], kind="stable")]
            for rank, other in enumerate(best.tolist(), 1):
                entry.setdefault(other, Logprob(float(values[other] - shift), rank))
        found.append(entry)
    return found
