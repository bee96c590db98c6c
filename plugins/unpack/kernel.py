"""A step as the host packed it -> the step tensors of a bucket, padded; tokens in flight come from `last_token`.

One copy brings the step to the GPU, one launch spreads it. The host packs what there is, without padding:

    T, S, width of the page table, R, M, 0, 1 if there is a tree of drafts, 0 (eight numbers), then query_start [S+1],
    tokens [T], positions [T], slots [T], kv_len [S], pages [S, width], logit_rows [R], sample_rows [R],
    sample_positions [R], what `plugins/draft` reads [3, M] and, with a tree, ancestors [T]

A token below 0 is in flight: -1 - row. Padding: slot 0, no tokens, no keys, logit row 0, sample row -1, all ancestors.
"""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import Kernel, Launch, Operand, Site, Tactic

HEADER = 8  # numbers before the arrays
BLOCK = 256


@triton.jit
def unpack_kernel(
    packed, last_token, tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions,
    ancestors,
    T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (S + blocks of the longest array): a program for each row of the page table, then one for each block.

    ancestors: None in buckets whose attention reads none.
    """
    begin(PDL)
    t = tl.load(packed)
    s = tl.load(packed + 1)
    width = tl.load(packed + 2)
    r = tl.load(packed + 3)
    starts_at = packed + 8
    tokens_at = starts_at + s + 1
    lengths_at = tokens_at + 3 * t
    pages_at = lengths_at + s
    rows_at = pages_at + s * width
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if program < S:
        if program < s:
            for start in range(0, width, BLOCK):
                column = start + i
                page = tl.load(pages_at + program * width + column, mask=column < width, other=0)
                tl.store(pages + program.to(tl.int64) * WIDTH + column, page, mask=column < width)
        return
    i += (program - S) * BLOCK
    token = tl.load(tokens_at + i, mask=i < t, other=0)
    known = tl.load(last_token - 1 - token, mask=(i < t) & (token < 0), other=0)
    tl.store(tokens + i, tl.where(token < 0, known, token), mask=i < T)
    tl.store(positions + i, tl.load(tokens_at + t + i, mask=i < t, other=0), mask=i < T)
    tl.store(slots + i, tl.load(tokens_at + 2 * t + i, mask=i < t, other=0), mask=i < T)
    tl.store(query_start + i, tl.load(starts_at + i, mask=i <= s, other=0) + tl.where(i > s, t, 0), mask=i <= S)
    tl.store(kv_len + i, tl.load(lengths_at + i, mask=i < s, other=0), mask=i < S)
    tl.store(logit_rows + i, tl.load(rows_at + i, mask=i < r, other=0), mask=i < R)
    tl.store(sample_rows + i, tl.load(rows_at + r + i, mask=i < r, other=-1), mask=i < R)
    tl.store(sample_positions + i, tl.load(rows_at + 2 * r + i, mask=i < r, other=0), mask=i < R)
    if ancestors is not None:
        ancestors_at = rows_at + 3 * r + 3 * tl.load(packed + 4)
        there = (i < t) & (tl.load(packed + 6) != 0)
        tl.store(ancestors + i, tl.load(ancestors_at + i, mask=there, other=-1), mask=i < T)


def tactics(site: Site) -> list[Tactic]:
    """inputs: packed, last_token. outputs: tokens, positions, slots, query_start, kv_len, pages, logit_rows,
    sample_rows, sample_positions and, where attention reads them, ancestors, all int32."""
    tokens, pages, rows = site.outputs[0].shape[0], site.outputs[5].shape, site.outputs[6].shape[0]
    constants: tuple[tuple[str, int | None], ...]
    constants = (("T", tokens), ("S", pages[0]), ("R", rows), ("WIDTH", pages[1]), ("BLOCK", BLOCK))
    names = unpack_kernel.arg_names[: 2 + len(site.outputs)]
    constants += () if "ancestors" in names else (("ancestors", None),)
    kernel = Kernel("unpack.kernel:unpack_kernel", tuple((name, "*i32") for name in names), constants)
    arguments = (*(Operand("input", i) for i in range(2)), *(Operand("output", i) for i in range(len(site.outputs))))
    grid = (pages[0] + triton.cdiv(max(tokens, pages[0] + 1, rows), BLOCK), 1, 1)
    return [Tactic("blocks", (Launch(kernel, grid, arguments),))]
