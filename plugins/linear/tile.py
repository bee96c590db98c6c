"""Some or many rows by a weight: tiles on tensor cores, the weight as the first operand, the rows as the second.

So 16 rows of x fill an instruction and a weight is read once for all rows of a tile. Where a weight has too few rows to
occupy the GPU its depth is split: each program leaves its part in the workspace, and the one that arrives last adds
them up in order (results do not vary from run to run). Weights are asked for before the kernels ahead are done, since
no kernel writes them.
"""

import triton
import triton.language as tl

from ..gated_activation.activate import gate
from ..pdl import launch_next, wait


@triton.jit
def prefetch(pointers):
    """Asks for the lines of memory that these addresses are in, into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def block_of(program, blocks_m, BLOCKS_N: tl.constexpr, GROUP: tl.constexpr):
    """(column block, row block): programs of GROUP neighbouring column blocks take all row blocks in turn, so that
    their weights stay in the L2 cache."""
    first = program // (GROUP * blocks_m) * GROUP
    size = tl.minimum(BLOCKS_N - first, GROUP)
    return first + program % (GROUP * blocks_m) % size, program % (GROUP * blocks_m) // size


@triton.jit
def arrived_last(arrived, PARTS: tl.constexpr):
    """Whether all PARTS are there: asked by each program when it has stored its own. `arrived` is zero again then."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == PARTS - 1
    tl.store(arrived, 0, mask=last)
    return last


@triton.jit
def finish(
    acc, bias, y, m, n, left, M, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores a tile acc [BN, BM] of rows n of the weight and m of x, with bias and activation, to columns of y from
    `left` on."""
    GATED: tl.constexpr = ACTIVATION != ""
    BW: tl.constexpr = BN // 2 if GATED else BN
    if BIAS:
        acc += tl.load(bias + n, mask=n < (2 * WIDTH if GATED else WIDTH), other=0.0).to(tl.float32)[:, None]
    out = acc.to(y.dtype.element_ty)
    if GATED:
        pairs = tl.reshape(out.to(tl.float32), [BN // 16, 2, 8, BM])
        gates, ups = tl.split(tl.permute(pairs, [0, 2, 3, 1]))
        out = tl.reshape(gate(gates, ups, ACTIVATION, y.dtype.element_ty), [BW, BM])
    i = left + tl.arange(0, BW)
    y_at = y + m[:, None].to(tl.int64) * WIDTH + i[None, :]
    tl.store(y_at, tl.trans(out), mask=(m[:, None] < M) & (i[None, :] < WIDTH))


@triton.jit
def rows_of(left, WIDTH: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr):
    """(rows of the weight, their columns in y) of the tile whose first column is `left`."""
    j = tl.arange(0, BN)
    if GATED:  # eight gates, their eight ups, ..: a thread that has a gate in an accumulator has its up, too
        column = left + j // 16 * 8 + j % 8
        n = column + j // 8 % 2 * WIDTH
    else:
        column = left + j
        n = column
    return n, column


@triton.jit
def linear_kernel(
    x, weight, bias, y, parts, arrived, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = x weight^T + bias; with an ACTIVATION, rows of the weight are gates, then ups, and y is [M, N / 2].

    DEPTH: of a part, a multiple of BK. With several PARTS `parts` [PARTS, M, N] is room for them and `arrived` counts,
    for each tile, those that are there; it is zero again in the end. EVEN: blocks divide N and K, so that only rows
    need masks. AHEAD: lines of 128 bytes of each row of the weight to ask for in advance, a power of two.
    """
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    program = tl.program_id(0)
    block_n, block_m = block_of(program, tl.cdiv(M, BM), (WIDTH + BW - 1) // BW, GROUP)
    left = block_n * BW
    m = block_m * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    n, column = rows_of(left, WIDTH, BN, GATED)
    inside = column < WIDTH
    if PDL and AHEAD > 0:
        LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
        ahead = tl.minimum(part * DEPTH + tl.arange(0, AHEAD) * LINE, K - 1)
        prefetch(weight + tl.where(inside, n, 0)[:, None].to(tl.int64) * K + ahead[None, :])
    wait(PDL)
    k = part * DEPTH + tl.arange(0, BK)
    w_at = weight + n[:, None].to(tl.int64) * K + k[None, :]
    x_at = x + m[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    end = DEPTH if K % DEPTH == 0 else tl.minimum(DEPTH, K - part * DEPTH)
    for start in range(0, end, BK):
        if EVEN:
            w = tl.load(w_at + start)
            t = tl.load(x_at + start, mask=m[None, :] < M, other=0.0)
        else:
            deep = k < K - start
            w = tl.load(w_at + start, mask=inside[:, None] & deep[None, :], other=0.0)
            t = tl.load(x_at + start, mask=(m[None, :] < M) & deep[:, None], other=0.0)
        acc = tl.dot(w, t, acc, input_precision="ieee")
    if PARTS > 1:
        size = tl.cast(M, tl.int64) * N  # one row is a constant
        place = m[None, :].to(tl.int64) * N + n[:, None]
        there = (m[None, :] < M) & inside[:, None]
        tl.store(parts + part * size + place, acc, mask=there)
        if not arrived_last(arrived + program, PARTS):
            return
        acc = tl.zeros([BN, BM], tl.float32)
        for each in tl.static_range(PARTS):
            acc += tl.load(parts + each * size + place, mask=there, other=0.0, cache_modifier=".cg")
    finish(acc, bias, y, m, n, left, M, WIDTH, BM, BN, BIAS, ACTIVATION)
