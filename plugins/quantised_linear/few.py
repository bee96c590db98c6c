"""A few rows by an int4 weight on tensor cores, each warp at slices of depth of its own.

A program reads SLICES neighbouring slices of its rows of the weight at a time, so that memory is asked for long pieces,
and there are warps enough where the weight has few rows, without parts to add up through memory. A warp multiplies the
even and the odd columns of its slice, four bytes at a time (`half_bytes`), and applies the scales of its groups; what
the warps have is added at the end.
"""

import triton
import triton.language as tl

from ..linear.tile import finish, prefetch, rows_of
from ..pdl import launch_next, wait
from .numbers import both, half_bytes, zero_points


@triton.jit
def quantised_few_kernel(
    x, weight, scale, zero, bias, y, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr,
    ZERO: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = x ((weight - zero) * scale)^T + bias, x in 16 bits; with an ACTIVATION, rows of the weight are gates,
    then ups, and y is [M, N / 2]. SLICE divides GROUP; GROUP 0: one scale a row."""
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    STEP: tl.constexpr = SLICE * SLICES // 2  # bytes
    left = tl.program_id(0) * BW
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n, column = rows_of(left, WIDTH, BN, GATED)
    inside = column < WIDTH
    n64 = tl.where(inside, n, 0).to(tl.int64)
    slice = tl.arange(0, SLICES)
    if PDL and AHEAD > 0:
        prefetch(weight + n64[:, None] * (K // 2) + tl.minimum(tl.arange(0, AHEAD) * 128, K // 2 - 1)[None, :])
    first = n64[None, :] * GROUPS  # [SLICES, BN]
    if GROUP > 0:
        first += tl.minimum(slice * SLICE // GROUP, GROUPS - 1)[:, None]
        s = tl.load(scale + first)
        if ZERO:
            z = zero_points(zero, first, inside[None, :], "int4")
    else:
        unit = tl.load(scale + n64)[:, None]
        if ZERO:
            z = zero_points(zero, n64, inside, "int4")[None, :]
    wait(PDL)
    stored = tl.arange(0, SLICE // 2)
    byte = slice[:, None] * (SLICE // 2) + stored[None, :]  # [SLICES, SLICE / 2]
    w_at = weight + n64[None, :, None] * (K // 2) + byte[:, None, :]
    words = x.to(tl.pointer_type(tl.int32), bitcast=True)
    x_at = words + m.to(tl.int64)[None, None, :] * (K // 2) + byte[:, :, None]  # [SLICES, SLICE / 2, BM]
    acc = tl.zeros([SLICES, BN, BM], tl.float32)
    for start in range(0, K // 2, STEP):
        deep = byte < K // 2 - start
        there = (m < M)[None, None, :] if EVEN else (m < M)[None, None, :] & deep[:, :, None]
        w = tl.load(w_at + start, mask=None if EVEN else deep[:, None, :], other=None if EVEN else 0)
        pair = tl.load(x_at + start, mask=there, other=0)
        if GROUP > 0:  # of the slice after this one: nothing waits for them
            further = tl.minimum((start * 2 + STEP * 2 + slice * SLICE) // GROUP, GROUPS - 1)
            ahead = n64[None, :] * GROUPS + further[:, None]
            s_ahead = tl.load(scale + ahead)
            if ZERO:
                z_ahead = zero_points(zero, ahead, inside[None, :], "int4")
        even, odd = both(pair, DTYPE)
        low, high = half_bytes(w, False, DTYPE), half_bytes(w, True, DTYPE)
        if ZERO:
            low, high = low - z[:, :, None].to(DTYPE), high - z[:, :, None].to(DTYPE)
        if GROUP > 0:
            total = tl.dot(low, even, out_dtype=tl.float32)
            total = tl.dot(high, odd, total, out_dtype=tl.float32)
            acc += total * s[:, :, None]
            s = s_ahead
            if ZERO:
                z = z_ahead
        else:
            acc = tl.dot(low, even, acc, out_dtype=tl.float32)
            acc = tl.dot(high, odd, acc, out_dtype=tl.float32)
    y32 = tl.sum(acc, 0)
    if GROUP == 0:
        y32 *= unit
    finish(y32, bias, y, m, n, left, M, WIDTH, BM, BN, BIAS, ACTIVATION)
