"""Some or many rows by a weight: tiles on tensor cores, the weight as the first operand, the rows as the second.

So 16 rows of x fill an instruction and a weight is read once for all rows of a tile. Where a weight has too few rows to
occupy the GPU its depth is split, and a second launch adds the parts, in order, so that results do not vary from run to
run. Weights are asked for before the kernels ahead are done, since no kernel writes them.
"""

import triton
import triton.language as tl

from ..gated_activation.activate import gate
from ..pdl import begin, launch_next, wait


@triton.jit
def prefetch(pointers):
    """Asks for the lines of memory that these addresses are in, into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def linear_kernel(
    x, weight, bias, y, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = x weight^T + bias; with an ACTIVATION, rows of the weight are gates, then ups, and y is [M, N / 2].

    DEPTH: of a part, a multiple of BK; several parts are y [parts, M, N]. EVEN: blocks divide N and K, so that only
    rows need masks. AHEAD: lines of 128 bytes of each row of the weight to ask for in advance, a power of two.
    """
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    # programs of GROUP neighbouring column blocks take all row blocks in turn: their weights stay in the L2 cache
    blocks_m = tl.cdiv(M, BM)
    BLOCKS_N: tl.constexpr = (WIDTH + BW - 1) // BW
    program = tl.program_id(0)
    first = program // (GROUP * blocks_m) * GROUP
    size = tl.minimum(BLOCKS_N - first, GROUP)
    left = (first + program % (GROUP * blocks_m) % size) * BW
    m = program % (GROUP * blocks_m) // size * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    j = tl.arange(0, BN)
    if GATED:  # eight gates, their eight ups, ..: a thread that has a gate in an accumulator has its up, too
        column = left + j // 16 * 8 + j % 8
        n = column + j // 8 % 2 * WIDTH
    else:
        column = left + j
        n = column
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
    if BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    out = acc.to(y.dtype.element_ty)
    if GATED:
        pairs = tl.reshape(out.to(tl.float32), [BN // 16, 2, 8, BM])
        gates, ups = tl.split(tl.permute(pairs, [0, 2, 3, 1]))
        out = tl.reshape(gate(gates, ups, ACTIVATION, y.dtype.element_ty), [BW, BM])
    i = left + tl.arange(0, BW)
    y_at = y + part.to(tl.int64) * M * WIDTH + m[:, None].to(tl.int64) * WIDTH + i[None, :]
    tl.store(y_at, tl.trans(out), mask=(m[:, None] < M) & (i[None, :] < WIDTH))


@triton.jit
def add_parts_kernel(parts, bias, y, size, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                     BIAS: tl.constexpr, PDL: tl.constexpr = False):  # fmt: skip
    begin(PDL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size + i, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + i % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=inside)
