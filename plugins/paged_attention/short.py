"""Decode over pages of 8 bits where contexts are short: as `whole.py` a program for each sequence and key head, but
with little to do before the first keys arrive and after the last.

A program of short contexts spends most of its time on what surrounds its keys, so here that is made small: keys and
values of earlier steps, which no kernel of this part writes, are asked for before the kernels ahead are done; queries
are rotated as two halves, whose columns lie next to each other, and multiplied with halves of keys; and the row's own
value joins the others behind the loop. The arithmetic is that of `rope/kernel.py`, `own.py` and `attend.py`.
"""

import triton
import triton.language as tl

from ..linear.tile import prefetch
from ..pdl import launch_next, wait
from ..quantised_linear.numbers import both
from .attend import LOG2E, LOWEST
from .stored import as_stored, column, factors, numbers, unit_of


@triton.jit
def turned(low, high, cosine, sine, C: tl.constexpr):
    """Both halves of the columns of a head, rotated, in fp32; rounded where the reference rounds: a product that has
    had 0 added to it is not made one operation with the next sum."""
    T: tl.constexpr = low.dtype
    low, high, cosine, sine = low.to(tl.float32), high.to(tl.float32), cosine.to(tl.float32), sine.to(tl.float32)
    nothing = tl.zeros_like(low)
    low_cosine, high_sine = tl.fma(low, cosine, nothing).to(C), tl.fma(high, sine, nothing).to(C)
    high_cosine, low_sine = tl.fma(high, cosine, nothing).to(C), tl.fma(low, sine, nothing).to(C)
    first = low_cosine.to(tl.float32) - high_sine.to(tl.float32)
    second = high_cosine.to(tl.float32) + low_sine.to(tl.float32)
    return first.to(C).to(T).to(tl.float32), second.to(C).to(T).to(tl.float32)


@triton.jit
def short_kernel(
    query, key, value, table, slots, query_start, kv_len, pages, k_pages, v_pages, sinks, y, k_scale, v_scale,
    STRIDE: tl.constexpr, KEY_AT: tl.constexpr, VALUE_AT: tl.constexpr, WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AHEAD: tl.constexpr,
    K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (key heads, sequences). Rows [STRIDE] of query hold keys and values, too; all D columns of a head, a power
    of two, are rotated, the second half with the first. AHEAD: keys that are asked for in advance."""
    launch_next(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = D // 2
    C: tl.constexpr = table.dtype.element_ty
    kv_head, s = tl.program_id(0), tl.program_id(1)
    row = tl.load(query_start + s)
    num_queries = tl.load(query_start + s + 1) - row
    last = tl.load(kv_len + s) - 1  # of the keys that earlier steps wrote, and one more
    k_unit, v_unit = unit_of(k_scale, kv_head, K_STEP), unit_of(v_scale, kv_head, V_STEP)
    k_inverse, v_inverse = tl.div_rn(k_unit * 0 + 1.0, k_unit), tl.div_rn(v_unit * 0 + 1.0, v_unit)
    page_row = pages + s.to(tl.int64) * WIDTH
    first = tl.maximum(last + 1 - WINDOW, 0) if WINDOW > 0 else last * 0
    if PDL:
        near = first + tl.arange(0, AHEAD)
        at = tl.load(page_row + near // PAGE, mask=near < last, other=0).to(tl.int64) * PAGE + near % PAGE
        prefetch(k_pages + (at * NUM_KV_HEADS + kv_head) * D)
        prefetch(v_pages + (at * NUM_KV_HEADS + kv_head) * D)
    each = tl.arange(0, BN)
    page = tl.load(page_row + (first + each) // PAGE, mask=first + each < last, other=0)
    slot = tl.load(slots + row, mask=num_queries == 1, other=0).to(tl.int64)
    wait(PDL)
    if num_queries != 1:
        return
    row = row.to(tl.int64)
    g, j = tl.arange(0, BM), tl.arange(0, HALF)
    head = kv_head * GROUP + g
    q_at = query + row * STRIDE + head[:, None] * D + j[None, :]
    inside = (g < GROUP)[:, None] & (j < HALF)[None, :]
    angle = table + row * D + (g * 0)[:, None] + j[None, :]  # for each row anew: no thread waits for another's
    cosine, sine = tl.load(angle, mask=inside, other=0.0), tl.load(angle + HALF, mask=inside, other=0.0)
    q_low, q_high = tl.load(q_at, mask=inside, other=0.0), tl.load(q_at + HALF, mask=inside, other=0.0)
    own_at, angle = query + row * STRIDE + KEY_AT + kv_head * D + j, table + row * D + j
    own_low, own_high = tl.load(own_at), tl.load(own_at + HALF)
    own_cosine, own_sine = tl.load(angle), tl.load(angle + HALF)
    words = query.to(tl.pointer_type(tl.int32), bitcast=True)
    q_low, q_high = turned(q_low, q_high, cosine, sine, C)
    f_low = factors(q_low.to(query.dtype.element_ty), k_pages)
    f_high = factors(q_high.to(query.dtype.element_ty), k_pages)
    factor = SOFTCAP * LOG2E if SOFTCAP > 0 else k_unit * (SCALE * LOG2E)
    # the row's own key
    own_low, own_high = turned(own_low, own_high, own_cosine, own_sine, C)
    own_low, own_high = as_stored(own_low, k_unit, k_inverse, k_pages), as_stored(own_high, k_unit, k_inverse, k_pages)
    own_place = slot * NUM_KV_HEADS + kv_head
    tl.store(k_pages + own_place * D + j, own_low)
    tl.store(k_pages + own_place * D + HALF + j, own_high)
    score = tl.sum(q_low * numbers(own_low, tl.float32)[None, :] + q_high * numbers(own_high, tl.float32)[None, :], 1)
    if SOFTCAP > 0:
        score = 1.0 - 2.0 / (1.0 + tl.exp2(score * (k_unit * (2.0 * LOG2E * SCALE / SOFTCAP))))
    v_pairs = v_pages.to(tl.pointer_type(tl.uint16), bitcast=True)
    T: tl.constexpr = v_pages.dtype.element_ty
    even = tl.zeros([BM, HALF], tl.float32)
    odd = tl.zeros([BM, HALF], tl.float32)
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in tl.range(first, last, BN):
        position = start + each
        exists = position < last
        place = (page.to(tl.int64) * PAGE + position % PAGE) * NUM_KV_HEADS + kv_head
        k_at = k_pages + place[None, :] * D + j[:, None]
        k_low = tl.load(k_at, mask=exists[None, :], other=0.0)
        k_high = tl.load(k_at + HALF, mask=exists[None, :], other=0.0)
        v = tl.load(v_pairs + place[:, None] * HALF + j[None, :], mask=exists[:, None], other=0)
        page = tl.load(page_row + (position + BN) // PAGE, mask=position + BN < last, other=0)
        scores = tl.dot(f_low, numbers(k_low, f_low.dtype))
        scores = tl.dot(f_high, numbers(k_high, f_low.dtype), scores)
        if SOFTCAP > 0:
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (k_unit * (2.0 * LOG2E * SCALE / SOFTCAP))))
        scores = tl.where(exists[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        w = weights.to(f_low.dtype)
        even = tl.dot(w, column(v, False, T, f_low.dtype), even * fade[:, None])
        odd = tl.dot(w, column(v, True, T, f_low.dtype), odd * fade[:, None])
        top = higher
    own_pair = tl.load(words + (row * STRIDE + VALUE_AT + kv_head * D) // 2 + j)
    own_even, own_odd = both(own_pair, query.dtype.element_ty)
    own_even = as_stored(own_even.to(tl.float32), v_unit, v_inverse, v_pages)
    own_odd = as_stored(own_odd.to(tl.float32), v_unit, v_inverse, v_pages)
    tl.store(v_pages + own_place * D + 2 * j, own_even)
    tl.store(v_pages + own_place * D + 2 * j + 1, own_odd)
    higher = tl.maximum(top, score * factor)
    fade, weight = tl.exp2(top - higher), tl.exp2(score * factor - higher)
    total = total * fade + weight
    even = even * fade[:, None] + weight[:, None] * numbers(own_even, tl.float32)[None, :]
    odd = odd * fade[:, None] + weight[:, None] * numbers(own_odd, tl.float32)[None, :]
    if SINKS:
        sink = tl.load(sinks + head, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
        total += tl.exp2(sink - higher)  # beyond fp32's numbers only where its share is all
    share = (v_unit / total)[:, None]
    out = tl.reshape(tl.join(even * share, odd * share), [BM, D])
    d = tl.arange(0, D)
    y_at = y + (row * NUM_HEADS + head)[:, None] * D + d[None, :]
    tl.store(y_at, out.to(y.dtype.element_ty), mask=(g < GROUP)[:, None])
