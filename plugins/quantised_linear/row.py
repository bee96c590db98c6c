"""Up to four rows by a weight in few bits without tensor cores: the weight is streamed once, scales on its heels.

As in `../linear/row.py` a thread multiplies eight neighbouring numbers of the weight with those of every row of x at
once; in int4 these are one word of 32 bits. Half bytes are put into the mantissa of floats, two by one shift: 1.03125
+ w / 256 and 1.5 + w / 16 take a bit operation each. x is multiplied by 256 and 16 for that, and what the constants
add to a sum is the same for all rows of the weight.
"""

import triton
import triton.language as tl

from ..gated_activation.activate import gate
from ..pdl import launch_next, wait
from .numbers import byte, zero_points

MOST_ROWS = 4
# bits 15 to 18; an argument, since of two bit operations by numbers in the code the compiler does not make one
LOW_HALF = 0x78000


@triton.jit
def words(bytes):
    """Four neighbouring bytes [.., 4] as they lie in a register: nothing is computed where a thread has loaded them."""
    return tl.sum(bytes.to(tl.int32) << (tl.arange(0, 4) * 8)[None, None, None, :], 3)


@triton.jit
def quantised_row_kernel(
    x, weight, scale, zero, x_scale, bias, y, low,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, X_SCALE: tl.constexpr, X_GROUP: tl.constexpr,
    X_KIND: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = (x * x_scale) ((weight - zero) * scale)^T + bias; with an ACTIVATION, rows of the weight are gates,
    then ups, and y is [M, N / 2].

    KIND: int4, int8, fp8 or `bits` (see numbers.py), X_KIND: the same of x. GROUP, X_GROUP: multiples of 8, or 0: one
    scale a row. X_SCALE: none, one, rows or groups. K is a multiple of 8. EVEN: blocks divide N and K.
    """
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    j = tl.arange(0, BN)
    column = tl.program_id(0) * BW + j % BW
    n = j // BW * WIDTH + column
    inside = EVEN or column < WIDTH
    m = tl.arange(0, BM)
    eight = tl.arange(0, BK // 8)
    k = eight[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    x_at = x + m[None, :, None, None] * K + k  # [BK // 8, BM, 1, 8]
    n64 = tl.where(inside, n, 0).to(tl.int64)
    if KIND == "int4":  # four bytes, which are put together as a word below: threads take as many as eight of x
        pair = eight[:, None, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
        w_at = weight + n64[None, None, :, None] * (K // 2) + pair  # [BK // 8, 1, BN, 4]
        w = words(tl.load(w_at, mask=EVEN or pair * 2 < K, other=0, cache_modifier=".cg"))
    else:
        w_at = weight + n64[None, None, :, None] * K + k
        w = tl.load(w_at, mask=EVEN or k < K, other=0.0, cache_modifier=".cg")
    if GROUP > 0:
        first = n64[None, :] * GROUPS + (eight * 8 // GROUP)[:, None]
        s = tl.load(scale + first, mask=EVEN or (eight * 8 < K)[:, None], other=0.0)  # [BK // 8, BN]
    else:
        unit = tl.load(scale + n64)[None, :]  # read at the end it would have the launch wait for memory again
    if BIAS:
        add = tl.load(bias + n64).to(tl.float32)[None, :]
    wait(PDL)
    if X_SCALE == "one":
        x_unit = tl.load(x_scale)
    elif X_SCALE == "rows":
        x_unit = tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    half = tl.arange(0, 8)[None, None, None, :]  # of a word of int4
    left = 15 - half // 2 * 8  # a shift by which puts the pair that a half byte is of into the mantissa
    high = low * 16
    acc = tl.zeros([BK // 8, BM, BN], tl.float32)
    for start in range(0, K, BK):
        here = start + eight * 8  # first column of each eight
        further = here + BK < K
        if KIND == "int4":
            bytes = tl.load(w_at + (start + BK) // 2, mask=further[:, None, None, None], other=0, cache_modifier=".cg")
            ahead = words(bytes)
        else:
            ahead = tl.load(w_at + (start + BK), mask=further[:, None, None, None], other=0.0, cache_modifier=".cg")
        t = byte(tl.load(x_at + start, mask=(m < M)[None, :, None, None] & (here < K)[:, None, None, None], other=0.0),
                 X_KIND, tl.float32)  # fmt: skip
        if GROUP > 0:
            at = n64[None, :] * GROUPS + (here // GROUP)[:, None]
            there = EVEN or (here < K)[:, None]
            next_at = n64[None, :] * GROUPS + ((here + BK) // GROUP)[:, None]
            s_ahead = tl.load(scale + next_at, mask=further[:, None], other=0.0)
        else:
            at = n64[None, :]
            there = True
        if ZERO:
            total = tl.sum(t, 3)  # [BK // 8, BM, 1]
        if KIND == "int4":
            t *= tl.where(half % 2 == 0, 256.0, 16.0)
        if KIND == "int4":
            word = w[:, :, :, None]
            moved = tl.where(half < 4, word << tl.maximum(left, 0), word >> tl.maximum(-left, 0))
            bits = tl.where(half % 2 == 0, moved & low ^ 0x3F840000, moved & high ^ 0x3FC00000)
            v = bits.to(tl.float32, bitcast=True)  # 1.03125 + w / 256, 1.5 + w / 16
            product = tl.sum(v * t, 3) - tl.sum(t * tl.where(half % 2 == 0, 1.03125, 1.5), 3)
        else:
            product = tl.sum(byte(w, KIND, tl.float32) * t, 3)
        if ZERO:
            product -= total * zero_points(zero, at, there, KIND)[:, None, :]
        if GROUP > 0:
            product *= s[:, None, :]
            s = s_ahead
        if X_SCALE == "groups":
            x_groups = m[None, :] * ((K + X_GROUP - 1) // X_GROUP) + (here // X_GROUP)[:, None]
            product *= tl.load(x_scale + x_groups, mask=(m < M)[None, :] & (here < K)[:, None], other=0.0)[:, :, None]
        acc += product
        w = ahead
    y32 = tl.sum(acc, 0)  # [BM, BN]
    if GROUP == 0:
        y32 *= unit
    if X_SCALE == "one" or X_SCALE == "rows":
        y32 *= x_unit
    if BIAS:
        y32 += add
    out = y32.to(y.dtype.element_ty)
    if GATED:
        rounded = tl.permute(tl.reshape(out.to(tl.float32), [BM, 2, BW]), [0, 2, 1])
        gates, ups = tl.split(rounded)
        out = gate(gates, ups, ACTIVATION, y.dtype.element_ty)
    i = tl.program_id(0) * BW + tl.arange(0, BW)
    tl.store(y + m[:, None] * WIDTH + i[None, :], out, mask=(m[:, None] < M) & (i[None, :] < WIDTH))
