"""Sorts the (token, expert) pairs of a step by expert, on the device: which rows each block of the matrix products has.

Pair p is choice p % k of token p // k. `order` [blocks * BM] lists pairs expert by expert, each expert's share padded
with -1 to whole blocks of BM rows; `owner` [blocks] is the expert of each block, -1 where a block has no rows. A
program serves one expert and goes through the pairs in their order, so the result is the same in every run.
"""

import triton
import triton.language as tl

from ..pdl import begin


@triton.jit
def expert_of(index, pair, pairs, E: tl.constexpr):
    """Experts of some pairs; E where there is none."""
    expert = tl.load(index + pair, mask=pair < pairs, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)


@triton.jit
def count_kernel(index, counts, pairs, E: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr = False):
    """counts[e]: pairs of expert e. For so many pairs that each program of `sort_kernel` should not count them all."""
    begin(PDL)
    expert = tl.program_id(0)
    hits = tl.zeros([CHUNK], tl.int32)
    for start in range(0, pairs, CHUNK):
        hits += (expert_of(index, start + tl.arange(0, CHUNK), pairs, E) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(hits, 0))


@triton.jit
def sort_kernel(
    index, counts, order, owner, pairs, blocks,
    E: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr, COUNTED: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if COUNTED:
        count = tl.load(counts + bins, mask=bins < E, other=0)
    else:
        count = tl.zeros([BINS], tl.int32)
        for start in range(0, pairs, CHUNK):
            count += tl.histogram(expert_of(index, start + tl.arange(0, CHUNK), pairs, E), BINS)
        count = tl.where(bins < E, count, 0)
    needed = (count + BM - 1) // BM
    first = tl.sum(tl.where(bins < expert, needed, 0), 0)
    mine = tl.sum(tl.where(bins == expert, count, 0), 0)
    end = first + (mine + BM - 1) // BM
    if mine > 0:
        at = first * BM
        for start in range(0, pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            hit = (expert_of(index, pair, pairs, E) == expert).to(tl.int32)
            tl.store(order + at + tl.cumsum(hit, 0) - 1, pair, mask=hit > 0)
            at += tl.sum(hit, 0)
        row = (end - 1) * BM + tl.arange(0, BM)
        tl.store(order + row, tl.full([BM], -1, tl.int32), mask=row >= first * BM + mine)
        for start in range(first, end, 32):
            block = start + tl.arange(0, 32)
            tl.store(owner + block, tl.zeros([32], tl.int32) + expert, mask=block < end)
    if expert == E - 1:  # what is left has no rows
        for start in range(end, blocks, 32):
            block = start + tl.arange(0, 32)
            tl.store(owner + block, tl.full([32], -1, tl.int32), mask=block < blocks)
