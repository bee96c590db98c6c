"""Up to four rows by a weight in few bits without tensor cores: the weight is streamed once, scales on its heels.

As in `../linear/row.py` a thread multiplies eight neighbouring numbers of the weight with those of every row of x at
once; in int4 these are one word of 32 bits. Each half byte is put into the mantissa of a float: 1.5 + w / 16 takes a
shift and a bit operation. What that adds to a sum is the same for all rows of the weight: 24 times the sum of x.
"""

import triton
import triton.language as tl

from ..gated_activation.activate import gate
from ..pdl import launch_next, wait
from .numbers import byte, zero_points

MOST_ROWS = 4


@triton.jit
def quantised_row_kernel(
    x, weight, scale, zero, x_scale, bias, y,
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
    k = eight[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    x_at = x + m[:, None, None, None] * K + k
    n64 = tl.where(inside, n, 0).to(tl.int64)
    if KIND == "int4":  # words of eight numbers; threads take one at a time, as they take eight of x
        w_at = weight.to(tl.pointer_type(tl.int32)) + n64[:, None] * (K // 8) + tl.max_contiguous(eight, 1)[None, :]
        w = tl.load(w_at, mask=EVEN or (eight * 8 < K)[None, :], other=0, cache_modifier=".cg")
    else:
        w_at = weight + n64[None, :, None, None] * K + k
        w = tl.load(w_at, mask=EVEN or k < K, other=0.0, cache_modifier=".cg")
    STEP: tl.constexpr = BK // 8 if KIND == "int4" else BK
    wait(PDL)
    acc = tl.zeros([BM, BN, BK // 8], tl.float32)
    for start in range(0, K, BK):
        here = start + eight * 8  # first column of each eight
        further = here + BK < K
        if KIND == "int4":
            ahead = tl.load(w_at + (start // BK + 1) * STEP, mask=further[None, :], other=0, cache_modifier=".cg")
        else:
            ahead = tl.load(w_at + (start + BK), mask=further[None, None, :, None], other=0.0, cache_modifier=".cg")
        t = byte(tl.load(x_at + start, mask=(m < M)[:, None, None, None] & (here < K)[None, None, :, None], other=0.0),
                 X_KIND, tl.float32)  # fmt: skip
        if GROUP > 0:
            at = n64[:, None] * GROUPS + (here // GROUP)[None, :]
            there = EVEN or (here < K)[None, :]
            s = tl.load(scale + at, mask=there, other=0.0)
        else:
            at = n64[:, None]
            there = True
        total = tl.sum(t, 3)  # [BM, 1, BK // 8]
        if KIND == "int4":
            moved = (w[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :] & 15) << 19
            v = (moved ^ 0x3FC00000).to(tl.float32, bitcast=True)  # 1.5 + w / 16
            product = tl.sum(v[None, :, :, :] * t, 3) * 16.0 - total * 24.0
        else:
            product = tl.sum(byte(w, KIND, tl.float32) * t, 3)
        if ZERO:
            product -= total * zero_points(zero, at, there, KIND)[None, :, :]
        if GROUP > 0:
            product *= s[None, :, :]
        if X_SCALE == "groups":
            x_groups = m[:, None] * ((K + X_GROUP - 1) // X_GROUP) + (here // X_GROUP)[None, :]
            product *= tl.load(x_scale + x_groups, mask=(m < M)[:, None] & (here < K)[None, :], other=0.0)[:, None, :]
        acc += product
        w = ahead
    y32 = tl.sum(acc, 2)  # [BM, BN]
    if GROUP == 0:
        y32 *= tl.load(scale + n64)[None, :]
    if X_SCALE == "one":
        y32 *= tl.load(x_scale)
    elif X_SCALE == "rows":
        y32 *= tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    if BIAS:
        y32 += tl.load(bias + n64).to(tl.float32)[None, :]
    out = y32.to(y.dtype.element_ty)
    if GATED:
        rounded = tl.permute(tl.reshape(out.to(tl.float32), [BM, 2, BW]), [0, 2, 1])
        gates, ups = tl.split(rounded)
        out = gate(gates, ups, ACTIVATION, y.dtype.element_ty)
    i = tl.program_id(0) * BW + tl.arange(0, BW)
    tl.store(y + m[:, None] * WIDTH + i[None, :], out, mask=(m[:, None] < M) & (i[None, :] < WIDTH))
