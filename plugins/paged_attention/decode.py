"""Decode on the GPU: sequences with one query token, their keys split over programs (flash-decoding).

A program takes a share of the keys of one sequence and one key head. A sequence's keys are shared out by its own
length, so programs beyond it exit at once. A sequence with a single share is written out directly; else each share
leaves its accumulator, maximum and total in the workspace, and they are merged in order (results do not vary from run
to run): by `merge_kernel`, or without another launch by the program that arrives last.
"""

import triton
import triton.language as tl

from ..pdl import begin
from .attend import LOWEST, attend, finish


@triton.jit
def share_out(length, splits, BN: tl.constexpr, WINDOW: tl.constexpr):
    """First key in reach of the query of a sequence of `length` keys, keys of a share, number of shares."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(length - first, BN), splits), 1) * BN
    return first, share, tl.cdiv(length - first, share)


@triton.jit
def merge(
    parts, tops, totals, sinks, y, unit, row, kv_head, num_shares, splits,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    SINKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the GROUP heads of a unit (a sequence and key head) from its shares, CHUNK of them at a time."""
    g = tl.arange(0, BG)
    dv = tl.arange(0, BDV)
    acc = tl.zeros([BG, BDV], tl.float32)
    top = tl.full([BG], LOWEST, tl.float32)
    total = tl.zeros([BG], tl.float32)
    for start in range(0, num_shares, CHUNK):
        share = start + tl.arange(0, CHUNK)
        at = (unit * splits + share)[:, None] * GROUP + g[None, :]  # [CHUNK, BG]
        inside = (share < num_shares)[:, None] & (g < GROUP)[None, :]
        part = tl.load(
            parts + at[:, :, None] * DV + dv[None, None, :], mask=inside[:, :, None] & (dv < DV)[None, None, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        part_top = tl.load(tops + at, mask=inside, other=LOWEST, cache_modifier=".cg")
        part_total = tl.load(totals + at, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(part_top, 0))
        weight = tl.exp2(part_top - higher[None, :])
        fade = tl.exp2(top - higher)
        acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * fade + tl.sum(part_total * weight, 0)
        top = higher
    head = kv_head * GROUP + g
    out = finish(acc, top, total, sinks, head, g < GROUP, SINKS)
    place = (row * NUM_HEADS + head)[:, None] * DV + dv[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=(g < GROUP)[:, None] & (dv < DV)[None, :])


@triton.jit
def decode_kernel(
    query, query_start, kv_len, pages, k_pages, v_pages, sinks, y, parts, tops, totals, arrived, splits,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, LAST_MERGES: tl.constexpr, BG: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (key heads, sequences, splits); SPLIT: there may be several.

    STRIDE: elements of a query row; WIDTH: of a row of the page table.
    """
    begin(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    s = tl.program_id(1)
    row = tl.load(query_start + s).to(tl.int64)
    length = tl.load(kv_len + s)
    if tl.load(query_start + s + 1) - row != 1:
        return
    first, share, num_shares = share_out(length, splits, BN, WINDOW)
    mine = tl.program_id(2)
    if mine >= num_shares:
        return
    start = first + mine * share
    end = tl.minimum(start + share, length)

    g = tl.arange(0, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    head = kv_head * GROUP + g
    q = tl.load(
        query + row * STRIDE + head[:, None] * D + d[None, :],
        mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    acc = tl.zeros([BM, BDV], tl.float32)
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    position = tl.zeros([BM], tl.int32) + (length - 1)
    acc, top, total = attend(
        q, acc, top, total, position, pages + s.to(tl.int64) * WIDTH, k_pages, v_pages, kv_head, start, end, end,
        NUM_KV_HEADS, D, DV, BD, BDV, PAGE, BN, SCALE, SOFTCAP, 0, True,
    )  # fmt: skip

    mask = (g < GROUP)[:, None] & (dv < DV)[None, :]
    if num_shares == 1:
        out = finish(acc, top, total, sinks, head, g < GROUP, SINKS)
        place = (row * NUM_HEADS + head)[:, None] * DV + dv[None, :]
        tl.store(y + place, out.to(y.dtype.element_ty), mask=mask)
    elif SPLIT:
        unit = s.to(tl.int64) * NUM_KV_HEADS + kv_head
        at = (unit * splits + mine) * GROUP + g
        tl.store(parts + at[:, None] * DV + dv[None, :], acc, mask=mask)
        tl.store(tops + at, top, mask=g < GROUP)
        tl.store(totals + at, total, mask=g < GROUP)
        if LAST_MERGES:
            tl.debug_barrier()  # all threads have stored before one of them says so
            before = tl.atomic_add(arrived + unit, 1, sem="acq_rel")
            if before == num_shares - 1:
                merge(
                    parts, tops, totals, sinks, y, unit, row, kv_head, num_shares, splits,
                    NUM_HEADS, GROUP, BG, DV, BDV, SINKS, CHUNK,
                )  # fmt: skip


@triton.jit
def merge_kernel(
    query_start, kv_len, sinks, y, parts, tops, totals, splits,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (key heads, sequences), after a decode_kernel with the same BN and splits."""
    begin(PDL)
    kv_head = tl.program_id(0)
    s = tl.program_id(1)
    row = tl.load(query_start + s).to(tl.int64)
    length = tl.load(kv_len + s)
    if tl.load(query_start + s + 1) - row != 1:
        return
    _, _, num_shares = share_out(length, splits, BN, WINDOW)
    if num_shares > 1:
        merge(
            parts, tops, totals, sinks, y, s.to(tl.int64) * NUM_KV_HEADS + kv_head, row, kv_head, num_shares, splits,
            NUM_HEADS, NUM_HEADS // NUM_KV_HEADS, BG, DV, BDV, SINKS, CHUNK,
        )  # fmt: skip
