"""Some or many rows by a weight in few bits, in tiles on tensor cores; laid out as `../linear/tile.py`.

What tensor cores multiply are the stored numbers: 8-bit by 8-bit ones where x is quantised, else the weight's as exact
16-bit floats. Scales are applied to sums in fp32: once at the end, or after each slice of depth where groups have
scales of their own (a slice lies in one group). Of an int4 byte the lower half belongs to an even column and the upper
to an odd one: the tile is multiplied by the even and by the odd columns of x, one after the other. Where the tensor
cores read those from shared memory `halves.py` has taken them apart (HALVES).
"""

import triton
import triton.language as tl

from ..linear.tile import arrived_last, block_of, finish, prefetch, rows_of
from ..pdl import launch_next, wait
from .numbers import await_products, both, byte, half_bytes, zero_points


@triton.jit
def quantised_kernel(
    x, weight, scale, zero, x_scale, bias, y, parts, arrived, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    X_SCALE: tl.constexpr, X_GROUP: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr, HALVES: tl.constexpr, WAITS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = (x * x_scale) ((weight - zero) * scale)^T + bias; as `linear_kernel` with `quantised_row_kernel`'s
    numbers and scales. BK divides GROUP and X_GROUP where these are not 0. An x in 8 bits multiplies numbers of its
    own type, or int4. WAITS: tensor cores read weights from registers, and products go on into the next slice."""
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    INT4: tl.constexpr = KIND == "int4"
    DTYPE: tl.constexpr = x.dtype.element_ty
    GROUPED: tl.constexpr = X_SCALE == "groups"
    SLICED: tl.constexpr = GROUP > 0 or GROUPED
    SUM: tl.constexpr = tl.int32 if DTYPE == tl.int8 else tl.float32
    ACC: tl.constexpr = tl.float32 if SLICED else SUM
    NARROW: tl.constexpr = DTYPE == tl.int8 or DTYPE.primitive_bitwidth > 8
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    STORED: tl.constexpr = BK // 2 if INT4 else BK  # elements of the weight's array in a slice of a row
    LINE: tl.constexpr = K // 2 if INT4 else K
    PAIRS: tl.constexpr = INT4 and not HALVES and DTYPE.primitive_bitwidth == 16
    program = tl.program_id(0)
    block_n, block_m = block_of(program, tl.cdiv(M, BM), (WIDTH + BW - 1) // BW, 8)
    left = block_n * BW
    m = block_m * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    n, column = rows_of(left, WIDTH, BN, GATED)
    inside = column < WIDTH
    n64 = tl.where(inside, n, 0).to(tl.int64)
    first = part * (DEPTH // 2 if INT4 else DEPTH)
    if PDL and AHEAD > 0:
        prefetch(weight + n64[:, None] * LINE + tl.minimum(first + tl.arange(0, AHEAD) * 128, LINE - 1)[None, :])
    if ZERO and GROUP == 0:
        z = zero_points(zero, n64, inside, KIND)
    if GROUP > 0:
        s = tl.load(scale + n64 * GROUPS + part * DEPTH // GROUP)
        if ZERO:
            z = zero_points(zero, n64 * GROUPS + part * DEPTH // GROUP, inside, KIND)
    else:
        unit = tl.load(scale + n64)[:, None]  # read at the end it would have the launch wait for memory again
    wait(PDL)
    if X_SCALE == "one":
        x_unit = tl.load(x_scale)
    elif X_SCALE == "rows":
        x_unit = tl.load(x_scale + m.to(tl.int64), mask=m < M, other=0.0)[None, :]
    stored = tl.arange(0, STORED)
    w_at = weight + n64[:, None] * LINE + first + stored[None, :]
    m64 = m.to(tl.int64)
    if HALVES:
        x_at = x + m64[None, :] * (K // 2) + first + stored[:, None]  # [BK // 2, BM] of even columns
        to_odd = tl.cast(M, tl.int64) * (K // 2)
    elif PAIRS:
        words = x.to(tl.pointer_type(tl.int32), bitcast=True)
        x_at = words + m64[None, :] * (K // 2) + first + stored[:, None]  # [BK // 2, BM]
    elif INT4:
        columns = tl.arange(0, BK)
        x_at = x + m64[:, None] * K + part * DEPTH + columns[None, :]  # [BM, BK]
    else:
        x_at = x + m64[None, :] * K + part * DEPTH + stored[:, None]  # [BK, BM]
    acc = tl.zeros([BN, BM], ACC)
    end = DEPTH if K % DEPTH == 0 else tl.minimum(DEPTH, K - part * DEPTH)
    for start in range(0, end, BK):
        if WAITS:
            await_products()
        k = part * DEPTH + start
        deep = stored < (K - k) // 2 if INT4 else stored < K - k
        at = start // 2 if INT4 else start
        w = tl.load(w_at + at, mask=None if EVEN else deep[None, :], other=None if EVEN else 0.0)
        if GROUP > 0:  # of the slice after this one: nothing waits for them
            ahead = n64 * GROUPS + tl.minimum((k + BK) // GROUP, GROUPS - 1)
            s_ahead = tl.load(scale + ahead)
            if ZERO:
                z_ahead = zero_points(zero, ahead, inside, KIND)
        if INT4:
            if PAIRS:
                there = (m < M)[None, :] if EVEN else (m < M)[None, :] & deep[:, None]
                even, odd = both(tl.load(x_at + at, mask=there, other=0), DTYPE)
            elif HALVES:
                there = (m < M)[None, :] if EVEN else (m < M)[None, :] & deep[:, None]
                even = tl.load(x_at + at, mask=there, other=0.0)
                odd = tl.load(x_at + (to_odd + at), mask=there, other=0.0)
                w = tl.reshape(tl.permute(tl.reshape(w, [BN, BK // 32, 4, 2, 2]), [0, 1, 3, 2, 4]), [BN, BK // 2])
            else:
                there = (m < M)[:, None] if EVEN else (m < M)[:, None] & (columns < K - k)[None, :]
                even, odd = tl.split(tl.reshape(tl.load(x_at + start, mask=there, other=0.0), [BM, BK // 2, 2]))
                even, odd = tl.trans(even), tl.trans(odd)
            low, high = half_bytes(w, False, DTYPE), half_bytes(w, True, DTYPE)
            if ZERO:
                low, high = low - z[:, None].to(DTYPE), high - z[:, None].to(DTYPE)
            if SLICED:
                total = tl.dot(low, even, input_precision="ieee", out_dtype=SUM)
                total = tl.dot(high, odd, total, input_precision="ieee", out_dtype=SUM)
            else:
                acc = tl.dot(low, even, acc, input_precision="ieee", out_dtype=SUM)
                acc = tl.dot(high, odd, acc, input_precision="ieee", out_dtype=SUM)
        else:
            there = (m < M)[None, :] if EVEN else (m < M)[None, :] & deep[:, None]
            t = tl.load(x_at + start, mask=there, other=0.0)
            if DTYPE.primitive_bitwidth > 8:
                w = byte(w, KIND, DTYPE)
                if ZERO:
                    w -= z[:, None].to(DTYPE)
            if SLICED:
                total = tl.dot(w, t, input_precision="ieee", out_dtype=SUM)
            else:
                if NARROW:
                    acc = tl.dot(w, t, acc, input_precision="ieee", out_dtype=SUM)
                else:  # a slice of fp8 goes to fp32, as the tensor cores keep fewer bits; asked for by
                    # max_num_imprecise_acc, each instruction would wait for the one before it
                    acc += tl.dot(w, t, out_dtype=SUM)
        if SLICED:
            scaled = total.to(tl.float32)
            if GROUP > 0:
                scaled *= s[:, None]
            if GROUPED:
                x_groups = m64 * ((K + X_GROUP - 1) // X_GROUP) + k // X_GROUP
                scaled *= tl.load(x_scale + x_groups, mask=m < M, other=0.0)[None, :]
            acc += scaled
        if GROUP > 0:
            s = s_ahead
            if ZERO:
                z = z_ahead
    acc = acc.to(tl.float32)
    if PARTS > 1:
        size = tl.cast(M, tl.int64) * N  # one row is a constant
        place = m64[None, :] * N + n[:, None]
        mine = (m[None, :] < M) & inside[:, None]
        tl.store(parts + part * size + place, acc, mask=mine)
        if not arrived_last(arrived + program, PARTS):
            return
        acc = tl.zeros([BN, BM], tl.float32)
        for each in tl.static_range(PARTS):
            acc += tl.load(parts + each * size + place, mask=mine, other=0.0, cache_modifier=".cg")
    if GROUP == 0:
        acc *= unit
    if X_SCALE == "one" or X_SCALE == "rows":
        acc *= x_unit
    finish(acc, bias, y, m, n, left, M, WIDTH, BM, BN, BIAS, ACTIVATION)
