"""Linear on the GPU: y = x weight^T + bias, for one row, for a few, and for many.

One row is a matrix-vector product (`linear_row_kernel`): each program streams a few rows of the weight with wide loads,
which reads at the memory's own speed. From two rows on the weight is the first operand of the tensor cores and the
tokens are the second (`linear_kernel`), so that 16 rows of tokens fill an instruction and every weight is read once;
where the weight has too few rows to occupy the GPU, the depth is split and a second launch adds the parts, in order, so
that results do not vary from run to run.
"""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor
from .library import FEWEST_ROWS, products


@triton.jit
def linear_row_kernel(
    x, weight, bias, y, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1)
    k = tl.arange(0, BK)
    rows = weight + n[:, None].to(tl.int64) * K
    acc = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        depth = start + k
        w = tl.load(rows + depth[None, :], mask=(n[:, None] < N) & (depth[None, :] < K), other=0.0)
        acc += w.to(tl.float32) * tl.load(x + m * K + depth, mask=depth < K, other=0.0).to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def linear_kernel(
    x, weight, bias, y, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    # EVEN: blocks divide N and K, so that only rows need masks
    # programs of GROUP neighbouring column blocks take all row blocks in turn: their weights stay in the L2 cache
    blocks_m = tl.cdiv(M, BM)
    BLOCKS_N: tl.constexpr = (N + BN - 1) // BN
    program = tl.program_id(0)
    first = program // (GROUP * blocks_m) * GROUP
    size = tl.minimum(BLOCKS_N - first, GROUP)
    n = (first + program % (GROUP * blocks_m) % size) * BN + tl.arange(0, BN)
    m = program % (GROUP * blocks_m) // size * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    k = part * DEPTH + tl.arange(0, BK)
    end = tl.minimum(part * DEPTH + DEPTH, K)
    w_at = weight + n[:, None].to(tl.int64) * K + k[None, :]
    x_at = x + m[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(0, DEPTH, BK):
        if EVEN:
            w = tl.load(w_at + start)
            t = tl.load(x_at + start, mask=m[None, :] < M, other=0.0)
        else:
            inside = tl.arange(0, BK) < end - part * DEPTH - start
            w = tl.load(w_at + start, mask=(n[:, None] < N) & inside[None, :], other=0.0)
            t = tl.load(x_at + start, mask=(m[None, :] < M) & inside[:, None], other=0.0)
        acc = tl.dot(w, t, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_at = y + part.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y_at, tl.trans(acc).to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


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


# (BN, BK, warps, stages) of tiles that hold all rows; BN x BK weights are in flight per stage
FEW = ((64, 128, 4, 4), (32, 256, 4, 4), (64, 256, 8, 3), (128, 64, 4, 5), (16, 512, 4, 3))
# (BM, BN, BK, warps, stages)
MANY = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (256, 128, 64, 8, 3))
# up to this many rows a weight is still read for few products: tiles that hold all rows, the depth split
SOME_ROWS = 512
SOME = ((128, 64, 64, 4, 4), (128, 64, 128, 4, 3), (128, 128, 64, 8, 4), (256, 64, 64, 8, 4), (256, 128, 64, 8, 3))
SMALL_TILES = ((32, 32, 32, 4, 2),)  # fp32, which has no tensor cores at full precision: registers are the limit


def tactics(site: Site) -> list[Tactic]:
    """For one row the vector form first; else tiles, likeliest first."""
    x, weight, bias = site.inputs
    assert x is not None and weight is not None
    rows = x.shape[0]
    found = []
    if rows <= 4:
        found += [_row(x, weight, bias, bn, bk, warps) for bn, bk, warps in ((2, 2048, 8), (4, 1024, 8), (1, 2048, 4))]
    if x.dtype == "float32":
        found += [_tiles(site, bm, bn, bk, warps, stages, 1) for bm, bn, bk, warps, stages in SMALL_TILES]
    elif rows <= 64:
        bm = max(16, triton.next_power_of_2(rows))
        for bn, bk, warps, stages in FEW:
            blocks = triton.cdiv(weight.shape[0], bn)
            parts = {1, min(8, max(1, site.device.num_sms // blocks), max(1, weight.shape[1] // (2 * bk)))}
            found += [_tiles(site, bm, bn, bk, warps, stages, p) for p in sorted(parts, reverse=True)]
    else:
        found += [_tiles(site, bm, bn, bk, warps, stages, 1) for bm, bn, bk, warps, stages in MANY]
        for bm, bn, bk, warps, stages in SOME if rows <= SOME_ROWS else ():
            blocks = triton.cdiv(rows, bm) * triton.cdiv(weight.shape[0], bn)
            most = max(1, min(4, weight.shape[1] // (4 * bk), 2 * site.device.num_sms // blocks))
            found += [_tiles(site, bm, bn, bk, warps, stages, parts) for parts in range(1, most + 1)]
    if site.device.cublas and rows > FEWEST_ROWS:
        found += products(site)
    return list({tactic.name: tactic for tactic in found}.values())


def _row(x: Tensor, weight: Tensor, bias: Tensor | None, bn: int, bk: int, warps: int) -> Tactic:
    rows, (width, depth) = x.shape[0], weight.shape
    bk = min(bk, max(16, triton.next_power_of_2(depth)))
    constants = (("N", width), ("K", depth), ("BN", bn), ("BK", bk), ("BIAS", bias is not None))
    arguments = (Operand("input", 0), Operand("input", 1), Operand("input", 2 if bias else 1), Operand("output", 0))
    kernel = Kernel("linear.kernel:linear_row_kernel", _signature(x.dtype, x.dtype), constants, num_warps=warps,
                    divisible=_aligned(x, weight))  # fmt: skip
    return Tactic(f"row {bn}x{bk}", (Launch(kernel, (triton.cdiv(width, bn), rows, 1), arguments),))


def _tiles(site: Site, bm: int, bn: int, bk: int, warps: int, stages: int, parts: int) -> Tactic:
    x, weight, bias = site.inputs
    assert x is not None and weight is not None
    rows, (width, depth) = x.shape[0], weight.shape
    share = triton.cdiv(triton.cdiv(depth, parts), bk) * bk
    parts = triton.cdiv(depth, share)
    target = "float32" if parts > 1 else x.dtype
    even = width % bn == 0 and parts * share == depth
    constants = (("N", width), ("K", depth), ("BM", bm), ("BN", bn), ("BK", bk), ("DEPTH", share), ("GROUP", 8),
                 ("BIAS", bias is not None and parts == 1), ("EVEN", even))  # fmt: skip
    signature = (*_signature(x.dtype, target), ("M", "i32"))
    kernel = Kernel("linear.kernel:linear_kernel", signature, constants, warps, stages, divisible=_aligned(x, weight))
    grid = (triton.cdiv(rows, bm) * triton.cdiv(width, bn), parts, 1)
    operands = (Operand("input", 0), Operand("input", 1), Operand("input", 2 if bias else 1))
    name = f"{bm}x{bn}x{bk} warps{warps} stages{stages} parts{parts}"
    if parts == 1:
        return Tactic(name, (Launch(kernel, grid, (*operands, Operand("output", 0), rows)),))
    add = Kernel(
        "linear.kernel:add_parts_kernel",
        (("parts", "*fp32"), ("bias", POINTERS[x.dtype]), ("y", POINTERS[x.dtype]), ("size", "i32")),
        (("N", width), ("PARTS", parts), ("BLOCK", 512), ("BIAS", bias is not None)),
        divisible=("parts", "y"),
    )
    second = Launch(add, (triton.cdiv(rows * width, 512), 1, 1),
                    (Operand("workspace", 0), operands[2], Operand("output", 0), rows * width))  # fmt: skip
    first = Launch(kernel, grid, (*operands, Operand("workspace", 0), rows))
    return Tactic(name, (first, second), workspace=4 * parts * rows * width)


def _signature(dtype: str, target: str) -> tuple[tuple[str, str], ...]:
    pointer = POINTERS[dtype]
    return (("x", pointer), ("weight", pointer), ("bias", pointer), ("y", POINTERS[target]))


def _aligned(x: Tensor, weight: Tensor) -> tuple[str, ...]:
    return ("x", "weight", "y") if weight.shape[1] % 16 == 0 else ()
