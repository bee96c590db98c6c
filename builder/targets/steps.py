"""The steps that attention is timed on: how many tokens and keys each sequence has, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...plugins.tactic import Site, Tensor

CONTEXTS = 256, 768  # keys of a sequence in a bucket for decoding short contexts
SPREAD = 64  # keys by which sequences differ: equal lengths of whole pages suit some splits better than any real step
LONG = 1 << 17  # keys of all sequences together where contexts may be long
LONGEST = 1 << 15  # keys of one sequence among short ones
SLOTS = {"PagedAttention": 3, "RotaryPagedAttention": 2}  # first of slots, query_start, kv_len, pages, k_pages
ANCESTORS = 9  # inputs behind slots


@dataclass(frozen=True)
class Step:
    """What attention is timed on: query tokens of each sequence, and its keys, those of the queries included."""

    queries: tuple[int, ...]
    lengths: tuple[int, ...]

    def num_pages(self, page_size: int) -> int:
        """Pages that the sequences fill, and the first, which nobody reads."""
        return 1 + sum(-(-n // page_size) for n in self.lengths)

    def arrays(self, site: Site) -> dict[int, np.ndarray]:
        """slots, query_start, kv_len and pages by their place among the op's inputs."""
        at, page_size = SLOTS[site.op], pool_of(site).shape[1]
        slots_like, table_like = site.inputs[at], site.inputs[at + 3]
        assert slots_like is not None and table_like is not None
        starts = np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)
        pages, slots, first = np.zeros(table_like.shape, np.int32), np.zeros(slots_like.shape, np.int32), 1
        for s, length in enumerate(self.lengths):
            count = -(-length // page_size)
            pages[s, :count] = np.arange(first, first + count)
            begin, end = starts[s], starts[s + 1]
            slots[begin:end] = first * page_size + np.arange(length - (end - begin), length)
            first += count
        found = {at: slots, at + 1: starts, at + 2: np.array(self.lengths, np.int32), at + 3: pages}
        if any(site.inputs[at + ANCESTORS :]):  # which the mask costs, whatever it says
            found[at + ANCESTORS] = np.full(slots.shape, -1, np.int32)
        return found


def steps(site: Site) -> list[Step | None]:
    """The steps to time a site on; None where the op reads no step.

    Attention: decode rows of CONTEXTS; where contexts may be long, all of them long, and one long one among short ones;
    the same with some queries of each sequence where drafts are verified; where there may be prompts, one that fills
    the bucket, and one that fills half of it behind a long context and short ones.
    """
    if site.op not in SLOTS:
        return [None]
    table, query = site.inputs[SLOTS[site.op] + 3], site.inputs[0]
    assert table is not None and query is not None
    tokens, (sequences, width) = query.shape[0], table.shape
    longest = min(width * pool_of(site).shape[1], site.max_context or LONGEST)
    each = min(tokens, site.max_query // 2 + 1) if site.max_query else 1  # queries: rarely as many as there may be
    num = min(sequences, max(1, tokens // each))

    def lengths_about(context: int) -> tuple[int, ...]:
        return tuple(max(each, min(context, longest) - 29 * i % SPREAD) for i in range(num))

    short = lengths_about(CONTEXTS[0])
    skewed = (longest, *short[1:])
    if site.max_query:
        several = [*map(lengths_about, CONTEXTS)] if site.max_context else [lengths_about(LONG // num), skewed]
        padding = (0,) * (sequences - num)
        return [Step((each,) * num + padding, lengths + padding) for lengths in several]
    half = tokens // 2
    return [_prompts(tokens, longest, sequences), _prompts(half, longest, sequences, skewed[: tokens - half])]


def _prompts(tokens: int, longest: int, sequences: int, decoding: tuple[int, ...] = ()) -> Step:
    """`tokens` of prompts, as few as hold them, behind rows of decoding of these lengths; padded sequences last."""
    counts = [min(longest, tokens - done) for done in range(0, tokens, longest)]
    counts = counts[: max(0, sequences - len(decoding))]
    padding = (0,) * (sequences - len(decoding) - len(counts))
    return Step((1,) * len(decoding) + (*counts, *padding), decoding + (*counts, *padding))


def pool_of(site: Site) -> Tensor:
    """The pool of keys of a site that reads a step."""
    pool = site.inputs[SLOTS[site.op] + 4]
    assert pool is not None
    return pool
