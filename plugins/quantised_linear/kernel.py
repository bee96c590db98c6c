"""QuantisedLinear on the GPU: one row to four (`row.py`), any number on tensor cores (`tile.py`), by cuBLASLt in FP8,
or dequantised first, as Linear does it.

The same kernels end in an activation where the weight holds gates and ups: see `../gated_quantised_linear`.
"""

from dataclasses import replace
from math import gcd
from typing import Any

import triton

from ..dequantise.kernel import dequantise, kind_of, pointer_of
from ..linear.kernel import tactics as products
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor
from .library import fp8_products
from .row import LOW_HALF, MOST_ROWS

Shape = tuple[int, int, int, int, int]  # BM, BN, BK, warps, stages
X, WEIGHT, SCALE, ZERO, X_SCALE, BIAS = range(6)  # inputs

SHARED = 227 << 10  # bytes that the programs on a multiprocessor of capability 9.0 share
FLOATS = "float32", "bfloat16", "float16"

# (BN, BK, warps) of the row kernel: a thread takes eight numbers of each row at a time
ROW = {
    "int4": ((4, 4096, 4), (8, 2048, 4), (8, 4096, 8), (4, 2048, 4), (2, 4096, 4)),
    "": ((2, 2048, 8), (4, 2048, 8), (4, 1024, 4), (2, 4096, 8)),
}
# (BN, BK, warps, stages) of tiles that hold all rows, up to FEW_ROWS
FEW_ROWS = 64
FEW = {
    "int4": ((64, 128, 4, 5), (128, 128, 4, 4), (32, 128, 4, 6), (128, 128, 8, 4), (64, 64, 4, 6)),
    "": ((64, 256, 4, 4), (64, 128, 4, 5), (128, 128, 4, 5), (32, 256, 4, 4), (128, 128, 8, 4)),
}
SOME_ROWS = 512
SOME = ((128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4), (128, 256, 128, 8, 3), (256, 128, 64, 8, 4))
MANY = ((128, 256, 128, 8, 3), (128, 128, 128, 8, 3), (256, 128, 128, 8, 3), (128, 128, 64, 8, 4), (64, 128, 128, 4, 3))
SMALL_TILES = ((32, 32, 64, 4, 2),)  # fp32: no tensor cores at full precision
FEWEST_DEQUANTISED = 256  # rows from which reading and writing the whole weight may be a small part
ROOM = 512 << 20  # bytes of a dequantised weight where there is another way


def tactics(site: Site) -> list[Tactic]:
    """All that could be the fastest, likeliest first; there is one for all types, since what is dequantised can be
    multiplied."""
    found = fp8_products(site) + own(site)
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    if not found or (x.shape[0] >= FEWEST_DEQUANTISED and 2 * weight.shape[0] * weight.shape[1] <= ROOM):
        found += dequantised(site)
    return found


def own(site: Site, activation: str = "") -> list[Tactic]:
    """The kernels of this folder. With an activation, rows of the weight are gates, then ups."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    found, even_bytes = [], weight.dtype != "int4" or weight.shape[1] % 8 == 0
    if x.shape[0] <= MOST_ROWS and weight.shape[1] % 8 == 0 and not _groups(site) % 8:
        found += [_row(site, activation, *shape) for shape in ROW.get(weight.dtype, ROW[""])]
    if even_bytes and _multiplies(site):
        found += [_tiles(site, activation, shape, parts) for shape, parts in _shapes(site)]
    return list({tactic.name: tactic for tactic in found}.values())


def _groups(site: Site) -> int:
    """The number of columns that all groups of a site are multiples of; 0: no groups."""
    return gcd(site.attributes["group"], site.attributes["x_group"])


def _multiplies(site: Site) -> bool:
    """Whether tiles of these types can be multiplied as they are."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    if x.dtype in FLOATS:
        return True
    if x.dtype == "float8_e4m3fn":
        return weight.dtype == x.dtype and site.device.capability >= 89
    return weight.dtype == "int4" or (weight.dtype == "int8" and site.inputs[ZERO] is None)


def _shapes(site: Site) -> list[tuple[Shape, int]]:
    """Tiles for the rows of a site, and into how many parts the depth is split."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    rows, power = x.shape[0], triton.next_power_of_2(x.shape[0])
    if x.dtype == "float32":
        fitting: list[Shape] = list(SMALL_TILES)
    elif rows <= FEW_ROWS:
        fitting = [(max(16, power), *shape) for shape in FEW.get(weight.dtype, FEW[""])]
    else:
        fitting = [s for s in SOME if s[0] <= max(64, power)] if rows <= SOME_ROWS else list(MANY)
    if x.dtype in FLOATS and weight.dtype != "int4":  # x fills the memory
        fitting = [(bm, bn, bk if bm < 128 else min(bk, 64), w, s) for bm, bn, bk, w, s in fitting]
    least = 64 if weight.dtype == "int4" and x.dtype not in FLOATS else 32  # of an instruction, in halves for int4
    groups = _groups(site)
    if groups:  # two accumulators: of the slice, and of all
        fitting = [shape for shape in fitting if shape[0] * shape[1] <= 2048 * shape[3]] or fitting[-1:]
    cut = [(bm, bn, gcd(bk, groups) if groups else bk, warps, stages) for bm, bn, bk, warps, stages in fitting]
    return [(shape, parts) for shape in cut if shape[2] >= least
            for parts in (_parts(site, shape) if rows <= SOME_ROWS and x.dtype != "float32" else [1])]  # fmt: skip


def _parts(site: Site, shape: Shape) -> list[int]:
    """Shares of the depth to try: one, and as many as fill the GPU with one or with all programs that fit."""
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    bm, bn, bk, warps, stages = shape
    blocks = triton.cdiv(x.shape[0], bm) * triton.cdiv(weight.shape[0], bn)
    stage = Tensor((bm, bk), x.dtype).num_bytes + Tensor((bn, bk), weight.dtype).num_bytes
    fit = max(1, min(SHARED // (stage * stages), 32 // warps))
    most = min(8, weight.shape[1] // (4 * bk))
    wanted = {1, site.device.num_sms // blocks, min(fit, 3) * site.device.num_sms // blocks}
    return sorted({max(1, min(most, parts)) for parts in wanted}, reverse=True)


def _constants(site: Site, activation: str) -> dict[str, Any]:
    """What both kernels are told about numbers and scales."""
    x_scale, x_group = site.inputs[X_SCALE], site.attributes["x_group"]
    how = "none" if x_scale is None else "one" if not x_scale.shape else "groups" if x_group else "rows"
    weight = site.inputs[WEIGHT]
    assert weight is not None
    return {
        "KIND": kind_of(weight, site.device.capability), "ZERO": site.inputs[ZERO] is not None,
        "GROUP": site.attributes["group"], "X_SCALE": how, "X_GROUP": x_group, "BIAS": site.inputs[BIAS] is not None,
        "ACTIVATION": activation,
    }  # fmt: skip


def _row(site: Site, activation: str, bn: int, bk: int, warps: int) -> Tactic:
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    rows, (width, depth) = x.shape[0], weight.shape
    bm = triton.next_power_of_2(rows)
    bk = max(256, min(bk, triton.next_power_of_2(depth)) // bm)
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    constants = _constants(site, activation) | {
        "M": rows, "N": width, "K": depth, "BM": bm, "BN": bn, "BK": bk,
        "X_KIND": kind_of(x, site.device.capability), "EVEN": columns % block == 0 and depth % bk == 0,
    }  # fmt: skip
    signature = (*_signature(site), ("low", "i32"))
    kernel = Kernel("quantised_linear.row:quantised_row_kernel", signature, tuple(constants.items()),
                    num_warps=warps, divisible=_aligned(site))  # fmt: skip
    launch = Launch(kernel, (triton.cdiv(columns, block), 1, 1), (*_operands(site), Operand("output", 0), LOW_HALF))
    return Tactic(f"row {bn}x{bk} warps{warps}", (launch,))


def _tiles(site: Site, activation: str, shape: Shape, parts: int) -> Tactic:
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    (bm, bn, bk, warps, stages), rows, (width, depth) = shape, x.shape[0], weight.shape
    share = triton.cdiv(triton.cdiv(depth, parts), bk) * bk
    parts = triton.cdiv(depth, share)
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, block)
    lines = Tensor((min(share, bk * stages),), weight.dtype).num_bytes // 128  # what is in flight a moment later
    constants = _constants(site, activation) | {
        "N": width, "K": depth, "BM": bm, "BN": bn, "BK": bk, "DEPTH": share, "PARTS": parts,
        "EVEN": columns % block == 0 and depth % bk == 0, "AHEAD": 1 << lines.bit_length() >> 1,
    }  # fmt: skip
    signature = (*_signature(site), ("parts", "*fp32"), ("arrived", "*i32"), ("M", "i32"))
    kernel = Kernel("quantised_linear.tile:quantised_kernel", signature, tuple(constants.items()), warps, stages,
                    divisible=_aligned(site))  # fmt: skip
    # a single part needs neither room nor counters: any pointer will do
    room = (Operand("workspace", 0), Operand("zeros", 0)) if parts > 1 else (Operand("output", 0),) * 2
    launch = Launch(kernel, (tiles, parts, 1), (*_operands(site), Operand("output", 0), *room, rows))
    name = f"{bm}x{bn}x{bk} warps{warps} stages{stages} parts{parts}"
    split = {"workspace": 4 * parts * rows * width, "zeros": 4 * tiles} if parts > 1 else {}
    return Tactic(name, (launch,), **split)


def _operands(site: Site) -> tuple[Operand, ...]:
    """All inputs; where one is absent, the weight: any pointer will do."""
    return tuple(Operand("input", i if each else WEIGHT) for i, each in enumerate(site.inputs))


def _signature(site: Site) -> tuple[tuple[str, str], ...]:
    names, capability = ("x", "weight", "scale", "zero", "x_scale", "bias"), site.device.capability
    weight = site.inputs[WEIGHT]
    assert weight is not None
    found = [(name, pointer_of(each or weight, capability)) for name, each in zip(names, site.inputs, strict=True)]
    return (*found, ("y", POINTERS[site.outputs[0].dtype]))


def _aligned(site: Site) -> tuple[str, ...]:
    weight = site.inputs[WEIGHT]
    assert weight is not None
    return ("x", "weight", "y") if weight.shape[1] % 32 == 0 else ()


def dequantised(site: Site) -> list[Tactic]:
    """The weight (and an x in 8 bits) dequantised into the workspace, then Linear's ways: two of its kernels' and those
    of cuBLASLt. Dequantised numbers are rounded to the type of y, as the Q/DQ form of the graph has it."""
    x, weight, scale, zero, x_scale, bias = site.inputs
    assert x is not None and weight is not None and scale is not None
    capability, y = site.device.capability, site.outputs[0]
    if weight.dtype == "int4" and weight.shape[1] % 2:
        return []
    whole = replace(weight, dtype=y.dtype, cold=False)
    size, launches, at = _aligned_bytes(whole), [], {WEIGHT: Operand("workspace", 0), BIAS: Operand("input", BIAS)}
    how = ("groups", site.attributes["group"]) if site.attributes["group"] else ("rows", 0)
    zero_at = Operand("input", ZERO if zero else WEIGHT)
    operands = (Operand("input", WEIGHT), Operand("input", SCALE), zero_at, at[WEIGHT])
    launches.append(dequantise(weight, scale, zero, whole, how, capability, operands))
    at[X] = Operand("input", X)
    rows = replace(x, dtype=y.dtype)
    if x_scale is not None:
        at[X] = Operand("workspace", size)
        size += _aligned_bytes(rows)
        kind = "one" if not x_scale.shape else "groups" if site.attributes["x_group"] else "rows"
        operands = (Operand("input", X), Operand("input", X_SCALE), Operand("input", X), at[X])
        launches.append(dequantise(x, x_scale, None, rows, (kind, site.attributes["x_group"]), capability, operands))
    found = products(Site("Linear", {}, (rows, whole, bias), (y,), site.device))
    mine = [each.name for each in found if not each.name.startswith("cublas")][2:]
    places = {0: at[X], 1: at[WEIGHT], 2: at[BIAS]}

    def moved(launch: Launch) -> Launch:
        arguments = [
            places[a.index] if isinstance(a, Operand) and a.kind == "input"
            else Operand("workspace", size + a.index) if isinstance(a, Operand) and a.kind == "workspace"
            else a
            for a in launch.arguments
        ]  # fmt: skip
        return replace(launch, arguments=tuple(arguments))

    return [
        Tactic(f"dequantised, then {each.name}", (*launches, *map(moved, each.launches)), size + each.workspace,
               each.zeros)
        for each in found if each.name not in mine
    ]  # fmt: skip


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.num_bytes // 256) * 256
