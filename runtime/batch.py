"""A step as arrays: the tensors of `engines/step.py` and the sampling columns, cut from one int32 arena.

The arrays lie in the arena as `plugins/unpack/kernel.py` reads them, so a GPU gets a step by one copy of `packed`.
Everything that grows with the number of tokens is array arithmetic; Python touches each request once. Page tables stay
in place from step to step and only grow. Two arenas take turns, so that a step is filled while the one before it runs.
Invariant: a batch is valid until the second `fill` after it; by then its step must be done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..engines import step as names
from .placement import Placement, needs_history
from .speculation.tree import Tree, bits
from .speculation.verify import Nodes
from .step import FROM_DEVICE, Step


class Scored(NamedTuple):
    """Prompt positions of one work whose log-probabilities were asked for."""

    work: int  # index into the step
    begin: int  # first of its logits rows
    token_ids: np.ndarray  # [n] the tokens that follow those positions
    num_logprobs: int


class Ahead(NamedTuple):
    """The M works of a step after which the executor is to draft; everything of them is known when the step is made."""

    table: np.ndarray  # [3, M] int32 behind the packed step: index into it, row of logits of the first sample, samples
    known: list[list[int]]  # the tokens of each request, to be read before anything more is committed


class Batch(NamedTuple):
    """What an executor needs to run a step. S sequences, T tokens, R logits rows, N samples; all arrays are int32."""

    inputs: dict[str, np.ndarray]  # the graph's, by their names; a token in flight is -1 - row
    packed: np.ndarray  # all of it as it lies in the arena, a header before it
    sample_index: np.ndarray  # [N] logits rows to sample from
    sample_rows: np.ndarray  # [N] the rows (of the scheduler) they belong to
    sample_positions: np.ndarray  # [N] positions of the new tokens
    sample_works: np.ndarray  # [N] index into the step
    drafts: np.ndarray | None  # [N] what was guessed for each sample, -1 for the last of a work; None: no guesses
    nodes: Nodes | None  # what was guessed, where some of it is a tree and `drafts` says nothing
    num_ahead: np.ndarray | None  # [S] tokens to draft when this step's are known; None: nothing
    ahead: Ahead | None  # of the works that have some of them
    columns: np.ndarray  # [2, R] of the logits rows: row of the scheduler or -1, position of the new token
    rows: np.ndarray  # [S] of the scheduler
    num_works: int
    placements: list[Placement]  # rows with a new request, before anything is sampled
    masks: list[tuple[int, np.ndarray]]  # (index of a sample, bits of the tokens it may be), see `grammar.py`
    scored: list[Scored]


HEADER = 8  # numbers in front of the packed arrays, see `plugins/unpack/kernel.py`


def packed_size(max_num_seqs: int, max_num_batched_tokens: int, width: int) -> int:
    """Numbers that the packed arrays of a step have at most; every token may want logits."""
    return HEADER + 7 * max_num_batched_tokens + (width + 8) * max_num_seqs + 8


def packed_step(
    query_start: ArrayLike, tokens: ArrayLike, positions: ArrayLike, slots: ArrayLike, kv_len: ArrayLike,
    pages: np.ndarray, logit_rows: ArrayLike, sample_rows: ArrayLike, sample_positions: ArrayLike,
) -> np.ndarray:  # fmt: skip
    """A step that an executor makes for itself, packed as `Arena` packs those of the scheduler. pages: [S, width]."""
    arrays = query_start, tokens, positions, slots, kv_len, pages, logit_rows, sample_rows, sample_positions
    header = np.zeros(HEADER, np.int32)
    header[:4] = np.size(tokens), len(pages), pages.shape[1], np.size(logit_rows)
    return np.concatenate([header, *map(np.ravel, arrays)]).astype(np.int32)


class Arena:
    """Buffers for steps of at most the given sizes; `fill(step)` makes the next batch."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        allocate: Callable[[int], np.ndarray] = lambda num_bytes: np.zeros(num_bytes, np.uint8),
    ):
        width = -(-max_model_len // page_size)
        size = packed_size(max_num_seqs, max_num_batched_tokens, width)
        self._buffers = [allocate(4 * size).view(np.int32) for _ in range(2)]
        self._page_size = page_size
        self._table = np.zeros((max_num_seqs, width), np.int32)  # page table by row
        self._num_pages = [0] * max_num_seqs  # entries of it that are up to date
        self._range = np.arange(max_num_batched_tokens + 1, dtype=np.int32)

    def fill(self, step: Step) -> Batch:
        """Read the step (before anything more is committed) into the arena whose turn it is."""
        self._buffers.reverse()
        cut = _Cut(self._buffers[0])
        header = cut(HEADER)
        num_works = len(step)
        self._place_pages(step)
        columns = np.array([work[1:5] for work in step], np.int32)  # [S, 4]
        rows, starts, counts, num_logits = columns.T
        query_start = cut(num_works + 1)
        query_start[0] = 0
        np.cumsum(counts, out=query_start[1:])
        ends, num_tokens = query_start[1:], int(query_start[-1])

        tokens, positions, slots = cut(num_tokens), cut(num_tokens), cut(num_tokens)
        self._fill_tokens(step, tokens)
        if num_tokens == num_works:  # nothing but single tokens
            token_rows, positions[:] = rows, starts
        else:
            token_rows = np.repeat(rows, counts)
            np.add(self._range[:num_tokens], np.repeat(starts - query_start[:-1], counts), out=positions)
        tokens[:] = np.where(tokens == FROM_DEVICE, -1 - token_rows, tokens)
        page, offset = np.divmod(positions, self._page_size)
        np.multiply(self._table[token_rows, page], self._page_size, out=slots)
        slots += offset
        guessed = any(work.drafts for work in step)
        ancestors = _place_trees(step, query_start, positions) if guessed else None

        kv_len = cut(num_works)
        np.add(starts, counts, out=kv_len)
        num_ahead = np.array([work.num_ahead for work in step], np.int32) if any(w.num_ahead for w in step) else None
        reach = kv_len if num_ahead is None else kv_len + num_ahead
        width = -(-int(reach.max()) // self._page_size)
        pages = cut(num_works * width).reshape(num_works, width)
        np.take(self._table[:, :width], rows, axis=0, out=pages)

        logit_ends = np.cumsum(num_logits, dtype=np.int32)
        num_rows = int(logit_ends[-1])
        logit_rows = cut(max(1, num_rows))  # a graph always gets one: none is a shape that kernels need not know
        logit_rows[0] = 0
        if num_rows:
            np.add(self._range[:num_rows], np.repeat(ends - logit_ends, num_logits), out=logit_rows)

        num_samples = np.array([work[6] for work in step])
        samples = np.flatnonzero(num_samples)
        sample_index, sample_positions, drafts = logit_ends[samples] - 1, kv_len[samples], None
        if guessed:
            samples = np.repeat(samples, num_samples[samples])  # work of each sample
            left = np.repeat(np.cumsum(num_samples), num_samples) - 1 - np.arange(len(samples))  # behind it
            sample_index, sample_positions = logit_ends[samples] - 1 - left, kv_len[samples] - left
            drafts = np.array([t for w in step if w.num_samples for t in (*w.drafts, -1)], np.int32)
        nodes = None
        if ancestors is not None:
            nodes = Nodes.of([work.drafts for work in step if work.num_samples])
            sample_positions = positions[logit_rows[sample_index]] + 1
        columns = cut(2 * len(logit_rows)).reshape(2, -1)
        columns[0], columns[1] = -1, 0
        columns[:, sample_index] = rows[samples], sample_positions
        ahead = None
        if num_ahead is not None:
            works = np.flatnonzero(num_ahead * num_samples)
            table = cut(3 * len(works)).reshape(3, -1)
            table[:] = works, logit_ends[works] - num_samples[works], num_samples[works]
            ahead = Ahead(table, [step[i].request.tokens for i in works])
        if ancestors is not None:
            cut(num_tokens)[:] = ancestors
        header[:4] = num_tokens, num_works, width, len(logit_rows)
        header[4:] = len(ahead.known) if ahead else 0, 0, ancestors is not None, 0
        return Batch(
            inputs={
                names.TOKENS: tokens, names.POSITIONS: positions, names.SLOTS: slots, names.QUERY_START: query_start,
                names.KV_LEN: kv_len, names.PAGES: pages, names.LOGIT_ROWS: logit_rows,
            } | ({} if ancestors is None else {names.ANCESTORS: ancestors}),
            packed=cut.all(),
            sample_index=sample_index,
            sample_rows=rows[samples],
            sample_positions=sample_positions,
            sample_works=samples,
            drafts=drafts,
            nodes=nodes,
            num_ahead=num_ahead,
            ahead=ahead,
            columns=columns,
            rows=rows,
            num_works=num_works,
            placements=_placements(step),
            masks=_masks(step),
            scored=_scored(step, logit_ends),
        )  # fmt: skip

    def _place_pages(self, step: Step) -> None:
        """Bring the page tables up to date: all of a row that is new to its request, else what was appended."""
        for work in step:
            row, pages = work.row, work.pages
            known = 0 if work.fresh else self._num_pages[row]
            if known != len(pages):
                self._table[row, known : len(pages)] = pages[known:]
                self._num_pages[row] = len(pages)

    @staticmethod
    def _fill_tokens(step: Step, tokens: np.ndarray) -> None:
        at, single = 0, []
        for work in step:
            request, _, start, count, *_ = work
            if count == 1:
                known = request.tokens
                single.append(known[start] if start < len(known) else FROM_DEVICE)
            else:
                if single:
                    tokens[at - len(single) : at] = single
                    single = []
                tokens[at : at + count] = work.tokens
            at += count
        if single:
            tokens[at - len(single) : at] = single


class _Cut:
    """Hands out an array in pieces, from its beginning."""

    def __init__(self, buffer: np.ndarray):
        self._buffer, self._used = buffer, 0

    def __call__(self, size: int) -> np.ndarray:
        begin, self._used = self._used, self._used + size
        return self._buffer[begin : self._used]

    def all(self) -> np.ndarray:
        """Everything handed out so far."""
        return self._buffer[: self._used]


def _place_trees(step: Step, query_start: np.ndarray, positions: np.ndarray) -> np.ndarray | None:
    """Gives nodes of trees the positions of their depths -> what each token sees [T]; None where there is no tree."""
    works = [i for i, work in enumerate(step) if work.drafts and isinstance(work.drafts, Tree)]
    if not works:
        return None
    depths: list[int] = []
    paths: list[int] = []
    for tree in (step[i].drafts for i in works):
        assert isinstance(tree, Tree)
        depths += tree.depths
        paths += tree.paths
    nums, ends = np.array([len(step[i].drafts) for i in works]), query_start[1:][works]
    nodes = np.arange(len(paths)) + np.repeat(ends - np.cumsum(nums), nums)
    positions[nodes] = np.repeat(positions[ends - nums - 1], nums) + depths
    ancestors = np.full(len(positions), -1, np.int32)
    ancestors[nodes] = bits(np.array(paths, np.uint64), np.repeat(nums, nums))
    return ancestors


def _masks(step: Step) -> list[tuple[int, np.ndarray]]:
    masks: list[tuple[int, np.ndarray]] = []
    at = 0
    for work in step:
        matcher = work.request.matcher
        if matcher and work.num_samples:
            masks += enumerate(matcher.masks(work.drafts), at)
        at += work.num_samples
    return masks


def _placements(step: Step) -> list[Placement]:
    placements = []
    for work in step:
        if work.fresh:
            request = work.request
            tokens = list(request.tokens) if needs_history(request.params) else ()  # a copy: commits append to it
            placements.append(
                Placement(work.row, request.params, request.seed, request.num_prompt, request.stop_ids, tokens)
            )
    return placements


def _scored(step: Step, logit_ends: np.ndarray) -> list[Scored]:
    scored = []
    for i, work in enumerate(step):
        num = work.num_logits - work.num_samples
        if num:
            begin = int(logit_ends[i]) - work.num_logits
            first = work.start + work.num_tokens - work.num_logits + 1
            token_ids = np.array(work.request.tokens[first : first + num])
            scored.append(Scored(i, begin, token_ids, work.request.params.prompt_logprobs or 0))
    return scored
