"""Linear on the GPU: y = x weight^T + bias, for a few rows (`row.py`), for more (`tile.py`), and by cuBLASLt.

The same kernels end in an activation where the weight holds gates and ups: see `../gated_linear`.
"""

import triton

from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor
from .library import FEWEST_ROWS, products
from .row import MOST_ROWS

SHARED = 227 << 10  # bytes that the programs on a multiprocessor of capability 9.0 share

# (BN, BK, warps) of the row kernel: a warp loads 256 numbers at a time
ROW = ((2, 2048, 8), (4, 2048, 8), (4, 1024, 4), (2, 1024, 4))
# (BN, BK, warps, stages) of tiles that hold all rows, up to FEW_ROWS; BN x BK weights are in flight per stage
FEW_ROWS = 64
FEW = ((64, 128, 4, 4), (32, 256, 4, 4), (128, 64, 4, 5), (64, 256, 4, 3), (128, 128, 8, 4), (16, 512, 4, 3))
# (BM, BN, BK, warps, stages): up to SOME_ROWS a weight is still read for few products
SOME_ROWS = 512
SOME = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 4), (128, 64, 128, 4, 4), (128, 64, 64, 4, 4), (128, 128, 128, 8, 3),
        (256, 128, 64, 8, 4), (256, 64, 64, 4, 4), (256, 64, 128, 8, 2))  # fmt: skip
MANY = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (256, 128, 64, 8, 4))
SMALL_TILES = ((32, 32, 32, 4, 2),)  # fp32, which has no tensor cores at full precision: registers are the limit


def tactics(site: Site) -> list[Tactic]:
    """All that could be the fastest, likeliest first."""
    found = own(site)
    if site.device.cublas and site.inputs[0] is not None and site.inputs[0].shape[0] > FEWEST_ROWS:
        found += products(site)
    return found


def own(site: Site, activation: str = "") -> list[Tactic]:
    """The kernels of this folder. With an activation, rows of the weight are gates, then ups, and nothing is split."""
    x, weight = site.inputs[:2]
    assert x is not None and weight is not None
    rows, found = x.shape[0], []
    if rows <= MOST_ROWS:
        found += [_row(site, activation, *shape) for shape in ROW]
    if x.dtype == "float32":
        tiles = [(shape, 1) for shape in SMALL_TILES]
    elif rows <= FEW_ROWS:
        bm = max(16, triton.next_power_of_2(rows))
        tiles = [((bm, *shape), parts) for shape in FEW for parts in _parts(site, (bm, *shape))]
    elif rows <= SOME_ROWS:
        some = [shape for shape in SOME if shape[0] <= triton.next_power_of_2(rows)]
        tiles = [(shape, parts) for shape in some for parts in _parts(site, shape)]
    else:
        tiles = [(shape, 1) for shape in MANY]
    found += [_tiles(site, activation, *shape, parts) for shape, parts in tiles if parts == 1 or not activation]
    return list({tactic.name: tactic for tactic in found}.values())


def _parts(site: Site, shape: tuple[int, int, int, int, int]) -> list[int]:
    """Shares of the depth to try: one, and as many as fill the GPU with one or with all programs that fit."""
    x, weight = site.inputs[:2]
    assert x is not None and weight is not None
    bm, bn, bk, warps, stages = shape
    blocks = triton.cdiv(x.shape[0], bm) * triton.cdiv(weight.shape[0], bn)
    fit = max(1, min(SHARED // (2 * (bm + bn) * bk * stages), 32 // warps))
    most = min(8, weight.shape[1] // (4 * bk))
    wanted = {1, site.device.num_sms // blocks, min(fit, 3) * site.device.num_sms // blocks}
    return sorted({max(1, min(most, parts)) for parts in wanted}, reverse=True)


def _row(site: Site, activation: str, bn: int, bk: int, warps: int) -> Tactic:
    x, weight, bias = site.inputs
    assert x is not None and weight is not None
    rows, (width, depth) = x.shape[0], weight.shape
    bk = min(bk, max(16, triton.next_power_of_2(depth)))
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    constants = (("M", rows), ("N", width), ("K", depth), ("BM", triton.next_power_of_2(rows)), ("BN", bn), ("BK", bk),
                 ("BIAS", bias is not None), ("EVEN", columns % block == 0 and depth % bk == 0),
                 ("ACTIVATION", activation))  # fmt: skip
    kernel = Kernel("linear.row:linear_row_kernel", _signature(x.dtype, x.dtype), constants, num_warps=warps,
                    divisible=_aligned(weight))  # fmt: skip
    launch = Launch(kernel, (triton.cdiv(columns, block), 1, 1), (*_operands(bias), Operand("output", 0)))
    return Tactic(f"row {bn}x{bk}", (launch,))


def _tiles(site: Site, activation: str, bm: int, bn: int, bk: int, warps: int, stages: int, parts: int) -> Tactic:
    x, weight, bias = site.inputs
    assert x is not None and weight is not None
    rows, (width, depth) = x.shape[0], weight.shape
    share = triton.cdiv(triton.cdiv(depth, parts), bk) * bk
    parts = triton.cdiv(depth, share)
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    lines = min(share, bk * stages) * 2 // 128
    constants = (("N", width), ("K", depth), ("BM", bm), ("BN", bn), ("BK", bk), ("DEPTH", share), ("GROUP", 8),
                 ("BIAS", bias is not None and parts == 1), ("EVEN", columns % block == 0 and depth % bk == 0),
                 ("ACTIVATION", activation), ("AHEAD", 1 << lines.bit_length() >> 1))  # fmt: skip
    signature = (*_signature(x.dtype, "float32" if parts > 1 else x.dtype), ("M", "i32"))
    kernel = Kernel("linear.tile:linear_kernel", signature, constants, warps, stages, divisible=_aligned(weight))
    grid = (triton.cdiv(rows, bm) * triton.cdiv(columns, block), parts, 1)
    operands, output = _operands(bias), Operand("output", 0)
    name = f"{bm}x{bn}x{bk} warps{warps} stages{stages} parts{parts}"
    if parts == 1:
        return Tactic(name, (Launch(kernel, grid, (*operands, output, rows)),))
    add = Kernel(
        "linear.tile:add_parts_kernel",
        (("parts", "*fp32"), ("bias", POINTERS[x.dtype]), ("y", POINTERS[x.dtype]), ("size", "i32")),
        (("N", width), ("PARTS", parts), ("BLOCK", 512), ("BIAS", bias is not None)),
        divisible=("parts", "y", *(("size",) if rows * width % 16 == 0 else ())),
    )
    second = Launch(add, (triton.cdiv(rows * width, 512), 1, 1),
                    (Operand("workspace", 0), operands[2], output, rows * width))  # fmt: skip
    first = Launch(kernel, grid, (*operands, Operand("workspace", 0), rows))
    return Tactic(name, (first, second), workspace=4 * parts * rows * width)


def _operands(bias: Tensor | None) -> tuple[Operand, ...]:
    return Operand("input", 0), Operand("input", 1), Operand("input", 2 if bias else 1)


def _signature(dtype: str, target: str) -> tuple[tuple[str, str], ...]:
    pointer = POINTERS[dtype]
    return (("x", pointer), ("weight", pointer), ("bias", pointer), ("y", POINTERS[target]))


def _aligned(weight: Tensor) -> tuple[str, ...]:
    return ("x", "weight", "y") if weight.shape[1] % 16 == 0 else ()
