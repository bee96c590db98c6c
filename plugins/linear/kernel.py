"""Linear on the GPU: y = x weight^T + bias, for a few rows (`row.py`), for more (`tile.py`), and by cuBLASLt.

The same kernels end in an activation where the weight holds gates and ups: see `../gated_linear`.
"""

import triton

from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor
from .library import FEWEST_ROWS, products
from .row import MOST_ROWS

Shape = tuple[int, int, int, int, int]

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
    """The kernels of this folder. With an activation, rows of the weight are gates, then ups."""
    x, weight = site.inputs[:2]
    assert x is not None and weight is not None
    rows, found = x.shape[0], []
    if rows <= MOST_ROWS:
        found += [_row(site, activation, *shape) for shape in ROW]
    found += [_tiles(site, activation, shape, parts) for shape, parts in _shapes(site)]
    return list({tactic.name: tactic for tactic in found}.values())


def _shapes(site: Site) -> list[tuple[Shape, int]]:
    """Tiles for the rows of a site, and into how many parts the depth is split."""
    x = site.inputs[0]
    assert x is not None
    if x.dtype == "float32":
        return [(shape, 1) for shape in SMALL_TILES]
    rows, power = x.shape[0], triton.next_power_of_2(x.shape[0])
    if rows > SOME_ROWS:
        return [(shape, 1) for shape in MANY]
    fitting = [(max(16, power), *shape) for shape in FEW] if rows <= FEW_ROWS else [s for s in SOME if s[0] <= power]
    return [(shape, parts) for shape in fitting for parts in _parts(site, shape)]


def _parts(site: Site, shape: Shape) -> list[int]:
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
    programs = triton.cdiv(columns, block)
    constants = (("M", rows), ("N", width), ("K", depth), ("BM", triton.next_power_of_2(rows)), ("BN", bn), ("BK", bk),
                 ("BIAS", bias is not None), ("EVEN", columns % block == 0 and depth % bk == 0),
                 ("ACTIVATION", activation))  # fmt: skip
    kernel = Kernel("linear.row:linear_row_kernel", _signature(x.dtype), constants, num_warps=warps,
                    divisible=_aligned(weight))  # fmt: skip
    launch = Launch(kernel, (programs, 1, 1), (*_operands(bias), Operand("output", 0)))
    return Tactic(f"row {bn}x{bk}", (launch,))


def _tiles(site: Site, activation: str, shape: Shape, parts: int) -> Tactic:
    x, weight, bias = site.inputs
    assert x is not None and weight is not None
    (bm, bn, bk, warps, stages), rows, (width, depth) = shape, x.shape[0], weight.shape
    share = triton.cdiv(triton.cdiv(depth, parts), bk) * bk
    parts = triton.cdiv(depth, share)
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, block)
    lines = min(share, bk * stages) * 2 // 128  # what is in flight a moment later
    constants = (("N", width), ("K", depth), ("BM", bm), ("BN", bn), ("BK", bk), ("DEPTH", share), ("PARTS", parts),
                 ("GROUP", 8), ("BIAS", bias is not None), ("EVEN", columns % block == 0 and depth % bk == 0),
                 ("ACTIVATION", activation), ("AHEAD", 1 << lines.bit_length() >> 1))  # fmt: skip
    signature = (*_signature(x.dtype), ("parts", "*fp32"), ("arrived", "*i32"), ("M", "i32"))
    kernel = Kernel("linear.tile:linear_kernel", signature, constants, warps, stages, divisible=_aligned(weight))
    # a single part needs neither room nor counters: any pointer will do
    room = (Operand("workspace", 0), Operand("zeros", 0)) if parts > 1 else (Operand("output", 0),) * 2
    launch = Launch(kernel, (tiles, parts, 1), (*_operands(bias), Operand("output", 0), *room, rows))
    name = f"{bm}x{bn}x{bk} warps{warps} stages{stages} parts{parts}"
    split = {"workspace": 4 * parts * rows * width, "zeros": 4 * tiles} if parts > 1 else {}
    return Tactic(name, (launch,), **split)


def _operands(bias: Tensor | None) -> tuple[Operand, ...]:
    return Operand("input", 0), Operand("input", 1), Operand("input", 2 if bias else 1)


def _signature(dtype: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, POINTERS[dtype]) for name in ("x", "weight", "bias", "y"))


def _aligned(weight: Tensor) -> tuple[str, ...]:
    return ("x", "weight", "y") if weight.shape[1] % 16 == 0 else ()
