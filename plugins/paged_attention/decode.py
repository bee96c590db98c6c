"""Decode on the GPU: the keys of all sequences with one query token, or a few, dealt out evenly to the programs.

How long the contexts of a step are is known on the device only, and a plan's grid is fixed. So the keys of all
sequences are laid end to end and each program takes an equal share: part of a long sequence, or several short ones. A
sequence that lies within one share is written out directly; else each of its programs leaves its accumulator, maximum
and total in the workspace, and the one that arrives last merges them in order (results do not vary from run to run).

Where drafts are verified a sequence has up to QUERIES query tokens. Their heads lie behind one another in the rows of a
block, so K and V are read once for all of them; each row sees what causality and the window leave it.
"""

import triton
import triton.language as tl

from ..pdl import launch_next, wait
from .attend import LOWEST, TREE, attend, finish
from .own import columns, own_key
from .stored import unit_of

UNIT = tl.constexpr(16)  # keys are dealt out in units of so many


@triton.jit
def reach(query_start, kv_len, s, inside, WINDOW: tl.constexpr, QUERIES: tl.constexpr, BACK: tl.constexpr):
    """First key that a query of sequence s sees, the number of units from there on, and the queries; no units where
    they are more than QUERIES, or none. BACK: positions by which a query may be earlier than its place."""
    num_queries = tl.load(query_start + s + 1, mask=inside, other=0) - tl.load(query_start + s, mask=inside, other=0)
    length = tl.load(kv_len + s, mask=inside, other=0)
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - num_queries + 1 - WINDOW - BACK, 0)
    mine = (num_queries > 0) & (num_queries <= QUERIES)
    return first, tl.where(mine, tl.cdiv(length - first, UNIT), 0), num_queries


@triton.jit
def merge(
    parts, tops, totals, v_unit, sinks, y, row, token, kv_head, leader, num_shares, programs,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    SINKS: tl.constexpr, CHUNK: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Writes the GROUP heads of a query token and key head from its sequence's shares, CHUNK of them at a time."""
    g = tl.arange(0, BG)
    dv = tl.arange(0, BDV)
    acc = tl.zeros([BG, BDV], tl.float32)
    top = tl.full([BG], LOWEST, tl.float32)
    total = tl.zeros([BG], tl.float32)
    for start in range(0, num_shares, CHUNK):
        share = start + tl.arange(0, CHUNK)
        place = kv_head * 2 * programs + 2 * (leader + share) + (share == 0).to(tl.int32)
        at = (place * QUERIES + token)[:, None] * GROUP + g[None, :]  # [CHUNK, BG]
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
        # none is negative, but a product may not be fused with the sum: threads that hold the same would round it apart
        total = total * fade + tl.sum(tl.maximum(part_total * weight, 0.0), 0)
        top = higher
    head = kv_head * GROUP + g
    out = finish(acc, top, total, v_unit, sinks, head, g < GROUP, SINKS)
    place = ((row + token) * NUM_HEADS + head)[:, None] * DV + dv[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=(g < GROUP)[:, None] & (dv < DV)[None, :])


@triton.jit
def decode_kernel(
    query, key, value, table, slots, query_start, kv_len, pages, k_pages, v_pages, sinks, y, parts, tops, totals,
    arrived, sequences, k_scale, v_scale,
    BS: tl.constexpr, STRIDE: tl.constexpr, KEY_AT: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_AT: tl.constexpr,
    VALUE_STRIDE: tl.constexpr, TURNED: tl.constexpr, ROTARY: tl.constexpr, OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr, OWN: tl.constexpr, WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PAGE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr,
    QUERIES: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    PDL: tl.constexpr = False, ancestors=None,
):  # fmt: skip
    """Grid (key heads, programs).

    STRIDE: elements of a query row; WIDTH: of a row of the page table; BS: at least `sequences`; LEAST: units of a
    share. OWN: the newest key is not in the pool yet (`own.py`). QUERIES: of a sequence at most, else it is left out.

    What a program leaves lies in place 2 * program, + 1 if the sequence begins in its share; `arrived` counts, for each
    program, the shares of the sequence that begins in its share and ends in another's, and is zero again in the end.
    """
    launch_next(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    mine = tl.program_id(1)
    programs = tl.num_programs(1)
    each = tl.arange(0, BS)
    BACK: tl.constexpr = 0 if ancestors is None else TREE
    _, units, _ = reach(query_start, kv_len, each, each < sequences, WINDOW, QUERIES, BACK)
    ends = tl.cumsum(units, 0)
    num_units = tl.sum(units, 0)
    share = tl.maximum(tl.cdiv(num_units, programs), LEAST)
    at = mine * share
    stop = tl.minimum(at + share, num_units)
    s = tl.sum((ends <= at).to(tl.int32), 0)
    begins = tl.sum(tl.where(each == s, ends - units, 0), 0)  # the unit at which sequence s begins
    k_unit, v_unit = unit_of(k_scale, kv_head, K_STEP), unit_of(v_scale, kv_head, V_STEP)
    wait(PDL)
    if at >= stop:
        return

    g = tl.arange(0, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    EDGE: tl.constexpr = WINDOW if QUERIES > 1 else 0  # a single query sees all keys from `first` on
    token = tl.zeros([BM], tl.int32)  # of the sequence's queries, for each row of the block
    if QUERIES > 1:
        token, g = g // BG, g % BG
    head = kv_head * GROUP + g
    while at < stop:
        first, num_units, num_queries = reach(query_start, kv_len, s, True, WINDOW, QUERIES, BACK)
        until = begins + num_units
        if num_units > 0:
            row = tl.load(query_start + s).to(tl.int64)
            length = tl.load(kv_len + s)
            if QUERIES > 1:
                inside = (g < GROUP) & (token < num_queries)
                at_row = row + token[:, None]
                position = length - num_queries + token
            else:
                inside = g < GROUP
                at_row = row
                position = tl.zeros([BM], tl.int32) + (length - 1)
            mask = inside[:, None] & (dv < DV)[None, :]
            seen = None
            trunk = length - TREE
            if ancestors is not None:
                seen = tl.load(ancestors + row + token, mask=inside, other=-1)
            q = columns(
                query, table, at_row, head[:, None] * D + d[None, :], inside[:, None] & (d < D)[None, :],
                STRIDE, TURNED, D, ROTARY, OFFSET, INTERLEAVED,
            )  # fmt: skip
            if OWN:
                acc, top, total = own_key(
                    q, key, value, table, slots, k_pages, v_pages, row, kv_head, k_unit, v_unit, until <= stop, KEY_AT,
                    KEY_STRIDE, VALUE_AT, VALUE_STRIDE, TURNED, ROTARY, OFFSET, INTERLEAVED, NUM_KV_HEADS, D, DV, BD,
                    BDV, BM, SCALE, SOFTCAP,
                )  # fmt: skip
            else:
                acc = tl.zeros([BM, BDV], tl.float32)
                top = tl.full([BM], LOWEST, tl.float32)
                total = tl.zeros([BM], tl.float32)
            start = first + (at - begins) * UNIT
            end = tl.minimum(first + (tl.minimum(until, stop) - begins) * UNIT, length - OWN)
            page_row = pages + s.to(tl.int64) * WIDTH
            acc, top, total = attend(
                q, acc, top, total, position, page_row, k_pages, v_pages, kv_head, k_unit, start, end, end,
                NUM_KV_HEADS, D, DV, BD, BDV, PAGE, BN, SCALE, SOFTCAP, EDGE, True, seen, trunk,
            )  # fmt: skip
            if (at == begins) & (until <= stop):
                out = finish(acc, top, total, v_unit, sinks, head, inside, SINKS)
                place = ((row + token) * NUM_HEADS + head)[:, None] * DV + dv[None, :]
                tl.store(y + place, out.to(y.dtype.element_ty), mask=mask)
            else:
                part = kv_head * 2 * programs + 2 * mine + (at == begins).to(tl.int32)
                part = (part * QUERIES + token) * GROUP + g
                tl.store(parts + part[:, None] * DV + dv[None, :], acc, mask=mask)
                tl.store(tops + part, top, mask=inside)
                tl.store(totals + part, total, mask=inside)
                tl.debug_barrier()  # all threads have stored before one of them says so
                leader = begins // share
                num_shares = (until - 1) // share - leader + 1
                before = tl.atomic_add(arrived + kv_head * programs + leader, 1, sem="acq_rel")
                if before == num_shares - 1:
                    for each_token in range(0, num_queries if QUERIES > 1 else 1):
                        merge(
                            parts, tops, totals, v_unit, sinks, y, row, each_token, kv_head, leader, num_shares,
                            programs, NUM_HEADS, GROUP, BG, DV, BDV, SINKS, CHUNK, QUERIES,
                        )  # fmt: skip
                    tl.store(arrived + kv_head * programs + leader, 0)
        at = tl.minimum(until, stop)
        begins = until
        s += 1
