"""The newest key of a row of decoding, straight from the projection: written to its slot, and attended first.

So decoding is one launch. What a step writes to the pool is not read from it in that step: the online softmax of a row
begins with the row's own key, which is never masked, and goes on with what earlier steps wrote. Query and key may be
rotated on the way, as `ingot::Rope` does it.
"""

import triton
import triton.language as tl

from ..rope.kernel import rotated
from .attend import LOG2E, LOWEST
from .stored import numbers, stored


@triton.jit
def columns(
    x, table, row, column, inside,
    STRIDE: tl.constexpr, TURNED: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some columns of a row [STRIDE] of x, heads before column TURNED rotated if ROTARY; zeros where not `inside`."""
    if ROTARY > 0:
        column = tl.where(inside, column, STRIDE)
        return rotated(x, table, row, column, STRIDE, TURNED, D, ROTARY, OFFSET, INTERLEAVED)
    return tl.load(x + row * STRIDE + column, mask=inside, other=0.0)


@triton.jit
def own_key(
    q, key, value, table, slots, k_pages, v_pages, row, kv_head, k_unit, v_unit, mine,
    KEY_AT: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_AT: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    TURNED: tl.constexpr, ROTARY: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The accumulator [BM, BDV], top and total [BM] (`attend`) of q [BM, BD] after the row's own key, which is written
    to its slot; those of no key unless `mine`. Attended is what was written: in pages of 8 bits the rounded key."""
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    k_there, v_there = (d < D) & mine, (dv < DV) & mine
    column = KEY_AT + kv_head * D + d
    k = columns(key, table, row, column, k_there, KEY_STRIDE, TURNED, D, ROTARY, OFFSET, INTERLEAVED)
    v = tl.load(value + row * VALUE_STRIDE + VALUE_AT + kv_head * DV + dv, mask=v_there, other=0.0)
    place = tl.load(slots + row).to(tl.int64) * NUM_KV_HEADS + kv_head
    k, v = stored(k, k_unit, k_pages), stored(v, v_unit, v_pages)
    tl.store(k_pages + place * D + d, k, mask=k_there)
    tl.store(v_pages + place * DV + dv, v, mask=v_there)
    score = tl.sum(q.to(tl.float32) * numbers(k, tl.float32)[None, :], 1)
    if SOFTCAP > 0:
        score = 1.0 - 2.0 / (1.0 + tl.exp2(score * (k_unit * (2.0 * LOG2E * SCALE / SOFTCAP))))
    factor = SOFTCAP * LOG2E if SOFTCAP > 0 else k_unit * (SCALE * LOG2E)
    top = tl.where(mine, score * factor, LOWEST)
    total = tl.zeros([BM], tl.float32) + tl.where(mine, 1.0, 0.0)
    acc = tl.zeros([BM, BDV], tl.float32) + numbers(v, tl.float32)[None, :]
    return acc, top, total
