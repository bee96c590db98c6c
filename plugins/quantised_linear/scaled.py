"""Many rows by an int4 weight whose numbers are scaled in registers, once for all rows of a tile.

`quantised_kernel` multiplies the stored numbers and scales the sums of each group, so that a tile has two sets of sums
and every slice of depth waits for the one before it. Here what the tensor cores multiply has its scale, rounded to the
type of x (what DequantizeLinear makes of it): one set of sums, which may be as wide as a thread's registers, and most
numbers of a slice are unpacked while its first are multiplied. x comes with each 32 columns taken apart (`halves.py`).
"""

import triton
import triton.language as tl

from ..linear.tile import arrived_last, block_of, finish, prefetch, rows_of
from ..pdl import launch_next, wait
from .numbers import await_products, half_bytes, scaled_half_bytes, zero_points


@triton.jit
def quantised_scaled_kernel(
    x, weight, scale, zero, bias, y, parts, arrived, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, PIECE: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = x ((weight - zero) * scale)^T + bias, as `quantised_kernel`. BK is a multiple of 32 and divides GROUP;
    GROUP 0: one scale a row, applied to the sums. WHOLE: BM divides M. `parts` [tiles, PARTS, BM, BN] is room for parts
    of the depth; PIECE: rows of a tile that are stored, or added up, at a time."""
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    DTYPE: tl.constexpr = x.dtype.element_ty
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    LINE: tl.constexpr = K // 2  # bytes
    WORDS: tl.constexpr = N * GROUPS % 8 == 0  # zero points can be read four bytes at a time, in advance
    program = tl.program_id(0)
    block_n, block_m = block_of(program, tl.cdiv(M, BM), (WIDTH + BW - 1) // BW, 8)
    left = block_n * BW
    m = block_m * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    n, column = rows_of(left, WIDTH, BN, GATED)
    inside = column < WIDTH
    n64 = tl.where(inside, n, 0).to(tl.int64)
    # a tile's offsets fit in 32 bits, and only its start moves
    offset = tl.where(inside, n - left, 0)
    weight += left.to(tl.int64) * LINE + part * (DEPTH // 2)
    if PDL and AHEAD > 0:
        ahead = tl.minimum(tl.arange(0, AHEAD) * 128, LINE - 1 - part * (DEPTH // 2))
        prefetch(weight + offset[:, None] * LINE + ahead[None, :])
    if GROUP == 0:
        unit = tl.load(scale + n64)[:, None]
    if ZERO and GROUP == 0:
        z = zero_points(zero, n64, inside, "int4")
    wait(PDL)
    stored, columns = tl.arange(0, BK // 2), tl.arange(0, BK)
    w_at = offset[:, None] * LINE + stored[None, :]
    x_at = tl.arange(0, BM)[None, :] * K + columns[:, None]
    x += (block_m * BM).to(tl.int64) * K + part * DEPTH
    acc = tl.zeros([BN, BM], tl.float32)
    end = DEPTH if K % DEPTH == 0 else tl.minimum(DEPTH, K - part * DEPTH)
    for start in range(0, end, BK):
        await_products()
        k = part * DEPTH + start
        if EVEN:
            w = tl.load(weight + start // 2 + w_at)
            t = tl.load(x + start + x_at, mask=None if WHOLE else m[None, :] < M, other=None if WHOLE else 0.0)
        else:
            w = tl.load(weight + start // 2 + w_at, mask=(stored < (K - k) // 2)[None, :], other=0)
            t = tl.load(x + start + x_at, mask=(m[None, :] < M) & (columns < K - k)[:, None], other=0.0)
        w = tl.reshape(tl.permute(tl.reshape(w, [BN, BK // 32, 4, 2, 2]), [0, 1, 3, 2, 4]), [BN, BK // 2])
        if GROUP > 0:
            group = n64 * GROUPS + k // GROUP
            s = tl.load(scale + group)
            if ZERO and WORDS:
                word = tl.load(zero.to(tl.pointer_type(tl.int32), bitcast=True) + group // 8)
                z = (word >> (group % 8 * 4).to(tl.int32) & 15 ^ 8) - 8
            elif ZERO:
                z = zero_points(zero, group, inside, "int4")
            else:
                z = s
            low, high = scaled_half_bytes(w, s[:, None], z[:, None], DTYPE, ZERO)
        else:
            low, high = half_bytes(w, False, DTYPE), half_bytes(w, True, DTYPE)
            if ZERO:
                low, high = low - z[:, None].to(DTYPE), high - z[:, None].to(DTYPE)
        both = tl.permute(tl.reshape(tl.join(low, high), [BN, BK // 32, 16, 2]), [0, 1, 3, 2])
        acc = tl.dot(tl.reshape(both, [BN, BK]), t, acc, out_dtype=tl.float32)
    if PARTS == 1:
        if GROUP == 0:
            acc *= unit
        finish(acc, bias, y, m, n, left, M, WIDTH, BM, BN, BIAS, ACTIVATION)
    else:
        j, i = tl.arange(0, BN), tl.arange(0, PIECE)
        room = parts + (program * PARTS).to(tl.int64) * (BM * BN)
        _store(room + part * (BM * BN), acc, BM, BN, PIECE)
        if not arrived_last(arrived + program, PARTS):
            return
        for at in range(0, BM, PIECE):
            place = room + (at + i[None, :]) * BN + j[:, None]
            total = tl.zeros([BN, PIECE], tl.float32)
            for each in tl.static_range(PARTS):
                total += tl.load(place + each * (BM * BN), cache_modifier=".cg")
            if GROUP == 0:
                total *= unit
            finish(total, bias, y, block_m * BM + at + i, n, left, M, WIDTH, PIECE, BN, BIAS, ACTIVATION)


@triton.jit
def _store(at, acc, BM: tl.constexpr, BN: tl.constexpr, PIECE: tl.constexpr):
    """acc [BN, BM] to [BM, BN] at `at`, at most PIECE rows of that at a time: all at once would not fit in registers
    beside their addresses."""
    if BM > PIECE:
        first, second = tl.split(tl.permute(tl.reshape(acc, [BN, 2, BM // 2]), [0, 2, 1]))
        _store(at, first, BM // 2, BN, PIECE)
        _store(at + BM // 2 * BN, second, BM // 2, BN, PIECE)
    else:
        tl.store(at + tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None], acc)
