"""A few rows by an int4 weight on tensor cores: x stays, and tiles of the weight pass by.

A program reads x once and goes through every tile of the weight whose turn it is: no tile waits for x, and of the
weight whole rows are under way, so that the memory is busy from the first tile to the last. `few.py` reads x again for
each tile, which from 8 rows on is more than the weight. Where the depth does not fit, a program has a part of it.
"""

import triton
import triton.language as tl

from ..linear.tile import arrived_last, finish, prefetch, rows_of
from ..pdl import launch_next, wait
from .numbers import both, half_bytes, zero_points


@triton.jit
def quantised_still_kernel(
    x, weight, scale, zero, bias, y, parts, arrived, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr,
    PARTS: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = x ((weight - zero) * scale)^T + bias, x in 16 bits, M at most BM; with an ACTIVATION, rows of the
    weight are gates, then ups, and y is [M, N / 2]. PARTS times SLICES, a power of two, of SLICE columns are K; SLICE
    divides GROUP, or GROUP is 0: one scale a row. BN rows of the weight, which divide N, are a tile; PROGRAMS share
    the tiles. `parts` [PARTS, M, N] is room for sums, and `arrived` [PROGRAMS] counts parts and is zero again at last.
    """
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    DTYPE: tl.constexpr = x.dtype.element_ty
    program, part = tl.program_id(0), tl.program_id(1)
    m, slice = tl.arange(0, BM), part * SLICES + tl.arange(0, SLICES)
    byte = slice[:, None] * (SLICE // 2) + tl.arange(0, SLICE // 2)[None, :]  # [SLICES, SLICE / 2]
    if PDL and AHEAD > 0:
        ahead = part * (SLICES * SLICE // 2) + tl.minimum(tl.arange(0, AHEAD) * 128, SLICES * SLICE // 2 - 1)
        for i in tl.static_range(STAGES - 1):
            n, column = rows_of(tl.minimum(program + i * PROGRAMS, WIDTH // BW - 1) * BW, WIDTH, BN, GATED)
            prefetch(weight + n.to(tl.int64)[:, None] * (K // 2) + ahead[None, :])
    wait(PDL)
    words = x.to(tl.pointer_type(tl.int32), bitcast=True)
    pair = tl.load(words + m[None, None, :] * (K // 2) + byte[:, :, None], mask=(m < M)[None, None, :], other=0)
    even, odd = both(pair, DTYPE)
    size = tl.cast(M, tl.int64) * N
    group = slice * SLICE // GROUP if GROUP > 0 else slice * 0
    for tile in tl.range(program, WIDTH // BW, PROGRAMS, num_stages=STAGES):  # said here, it holds for scales, too
        n, column = rows_of(tile * BW, WIDTH, BN, GATED)
        w = tl.load(weight + n.to(tl.int64)[None, :, None] * (K // 2) + byte[:, None, :])
        at = n.to(tl.int64)[None, :] * GROUPS + group[:, None]  # [SLICES, BN]
        s = tl.load(scale + at)
        if ZERO:
            z = zero_points(zero, at, at >= 0, "int4")
        low, high = half_bytes(w, False, DTYPE), half_bytes(w, True, DTYPE)
        if ZERO:
            low, high = low - z[:, :, None].to(DTYPE), high - z[:, :, None].to(DTYPE)
        total = tl.dot(low, even, out_dtype=tl.float32)
        total = tl.dot(high, odd, total, out_dtype=tl.float32)
        acc = tl.sum(total * s[:, :, None], 0)
        if PARTS == 1:
            finish(acc, bias, y, m, n, tile * BW, M, WIDTH, BM, BN, BIAS, ACTIVATION)
        else:
            tl.store(parts + part * size + m[None, :].to(tl.int64) * N + n[:, None], acc, mask=(m < M)[None, :])
    if PARTS > 1:
        if not arrived_last(arrived + program, PARTS):
            return
        for tile in range(program, WIDTH // BW, PROGRAMS):
            n, column = rows_of(tile * BW, WIDTH, BN, GATED)
            place = m[None, :].to(tl.int64) * N + n[:, None]
            acc = tl.zeros([BN, BM], tl.float32)
            for each in tl.static_range(PARTS):
                acc += tl.load(parts + each * size + place, mask=(m < M)[None, :], other=0.0, cache_modifier=".cg")
            finish(acc, bias, y, m, n, tile * BW, M, WIDTH, BM, BN, BIAS, ACTIVATION)
