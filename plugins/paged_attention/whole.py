"""Decode on the GPU, a program for each sequence and key head: the least work where sequences fill the GPU alone.

Nothing is split, so nothing is merged; one sequence far longer than the others keeps its programs busy alone, which is
why plans have it in buckets for short contexts (`decode.py` deals keys out evenly).
"""

import triton
import triton.language as tl

from ..pdl import launch_next, wait
from .attend import attend, finish
from .own import columns, own_key
from .stored import unit_of


@triton.jit
def whole_kernel(
    query, key, value, table, slots, query_start, kv_len, pages, k_pages, v_pages, sinks, y, k_scale, v_scale,
    STRIDE: tl.constexpr, KEY_AT: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_AT: tl.constexpr,
    VALUE_STRIDE: tl.constexpr, TURNED: tl.constexpr, ROTARY: tl.constexpr, OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, PAGE: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (key heads, sequences). Sequences that have not one query token are left out."""
    launch_next(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    s = tl.program_id(1)
    row = tl.load(query_start + s)
    num_queries = tl.load(query_start + s + 1) - row
    length = tl.load(kv_len + s)
    k_unit, v_unit = unit_of(k_scale, kv_head, K_STEP), unit_of(v_scale, kv_head, V_STEP)
    page_row = pages + s.to(tl.int64) * WIDTH
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    wait(PDL)
    if num_queries != 1:
        return
    row = row.to(tl.int64)
    g = tl.arange(0, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    head = kv_head * GROUP + g
    q = columns(
        query, table, row, head[:, None] * D + d[None, :], (g < GROUP)[:, None] & (d < D)[None, :],
        STRIDE, TURNED, D, ROTARY, OFFSET, INTERLEAVED,
    )  # fmt: skip
    acc, top, total = own_key(
        q, key, value, table, slots, k_pages, v_pages, row, kv_head, k_unit, v_unit, True, KEY_AT, KEY_STRIDE,
        VALUE_AT, VALUE_STRIDE, TURNED, ROTARY, OFFSET, INTERLEAVED, NUM_KV_HEADS, D, DV, BD, BDV, BM, SCALE, SOFTCAP,
    )  # fmt: skip
    position = tl.zeros([BM], tl.int32) + (length - 1)
    acc, top, total = attend(
        q, acc, top, total, position, page_row, k_pages, v_pages, kv_head, k_unit, first, length - 1, length - 1,
        NUM_KV_HEADS, D, DV, BD, BDV, PAGE, BN, SCALE, SOFTCAP, 0, True,
    )  # fmt: skip
    out = finish(acc, top, total, v_unit, sinks, head, g < GROUP, SINKS)
    place = (row * NUM_HEADS + head)[:, None] * DV + dv[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=(g < GROUP)[:, None] & (dv < DV)[None, :])
