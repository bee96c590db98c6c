"""The buckets of a plan by their sizes: a step is padded to the smallest that holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What a bucket holds at most; `max_query` is 1 for decoding, more where drafts are verified, 0 for any step;
    `max_context` is 0 for any."""

    tokens: int
    sequences: int
    rows: int
    max_query: int
    max_context: int = 0


SHORT = 1024  # keys of a sequence: decoding has buckets for contexts up to it, and others
MOST_VERIFIED = 512  # tokens of a step that verifies drafts; with more, a step's time is that of its products


def bucket_sizes(
    max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, max_draft_tokens: int = 0
) -> list[Sizes]:
    """Decoding by powers of two up to 16, then in steps that waste a quarter at most; steps with prompts likewise.

    max_draft_tokens: of a sequence; buckets for verification are for so many and for any fewer. They have the sizes of
    others, so that attention is all of them that is new: a step of n tokens reads the weights as n rows of decoding do.
    """
    contexts = [SHORT, 0] if max_model_len > 2 * SHORT else [0]
    decode = [Sizes(n, n, n, 1, context) for n in _ladder(1, max_num_seqs) for context in contexts]
    each = 1 + max_draft_tokens
    most = min(MOST_VERIFIED, max_num_seqs * each, max_num_batched_tokens) if max_draft_tokens else 0
    verify = [Sizes(n, min(n, max_num_seqs), n, each, c) for n in _ladder(4, most) for c in contexts if n > 1]
    rows = max(max_num_seqs, each)
    mixed = [Sizes(n, max_num_seqs, rows, 0) for n in _ladder(16, max_num_batched_tokens)]
    return decode + verify + mixed


def _ladder(first: int, last: int) -> list[int]:
    """first, .., 16, 32, 48, 64, 96, 128, 192, 256, .. last: each power of two and, from 32 on, the middle."""
    steps, n = [], first
    while n < last:
        steps += [n] if n < 32 else [n, n + n // 2]
        n *= 2
    return [n for n in steps if n < last] + [last]
