"""Rotation of packed rows into pages of 8 bits: what `kernel.py: rotate_kernel` does for plain ones.

Programs round only what they have: most columns are queries.
"""

import triton
import triton.language as tl

from ..paged_attention.stored import as_stored, numbers, unit_of
from ..pdl import begin
from ..rope.kernel import rotated


@triton.jit
def rotate_rounded_kernel(
    x, table, slots, query, k_pages, v_pages, own_k, own_v, k_scale, v_scale,
    WIDTH: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr, K_STEP: tl.constexpr,
    V_STEP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tokens, column blocks): columns of one token, rotated, to where they belong."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    KEYS: tl.constexpr = Q_WIDTH + K_WIDTH
    value = rotated(x, table, token, column, WIDTH, KEYS, HEAD_DIM, ROTARY, OFFSET, INTERLEAVED)
    if first < Q_WIDTH:
        tl.store(query + token * Q_WIDTH + column, value, mask=column < Q_WIDTH)
    if (first < KEYS) & (first + BLOCK > Q_WIDTH):
        # heads are counted from the first column of theirs, and those of other columns are the first or the last
        head = (tl.minimum(tl.maximum(column, Q_WIDTH), KEYS - 1) - Q_WIDTH) // HEAD_DIM
        unit = unit_of(k_scale, head if K_STEP > 0 else 0, K_STEP)
        k = as_stored(value.to(tl.float32), unit, tl.div_rn(unit * 0 + 1.0, unit), k_pages)
        mine = (column >= Q_WIDTH) & (column < KEYS)
        tl.store(k_pages + slot * K_WIDTH + column - Q_WIDTH, k, mask=mine)
        if own_k is not None:
            own = numbers(k, own_k.dtype.element_ty)
            tl.store(own_k + token * K_WIDTH + column - Q_WIDTH, own, mask=mine)
    if first + BLOCK > KEYS:
        head = (tl.minimum(tl.maximum(column, KEYS), WIDTH - 1) - KEYS) // DV
        unit = unit_of(v_scale, head if V_STEP > 0 else 0, V_STEP)
        v = as_stored(value.to(tl.float32), unit, tl.div_rn(unit * 0 + 1.0, unit), v_pages)
        mine = (column >= KEYS) & (column < WIDTH)
        tl.store(v_pages + slot * (WIDTH - KEYS) + column - KEYS, v, mask=mine)
        if own_v is not None:
            own = numbers(v, own_v.dtype.element_ty)
            tl.store(own_v + token * (WIDTH - KEYS) + column - KEYS, own, mask=mine)
