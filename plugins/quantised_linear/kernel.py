"""QuantisedLinear on the GPU: one row to four (`row.py`), some by an int4 weight (`few.py`), many by one (`scaled.py`),
any number on tensor cores (`tile.py`), by cuBLASLt in FP8, or dequantised first, as Linear does it.

The same kernels end in an activation where the weight holds gates and ups: see `../gated_quantised_linear`.
"""

from dataclasses import replace
from typing import Any

import triton

from ..dequantise.kernel import dequantise, kind_of, pointer_of
from ..linear.kernel import tactics as products
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor
from .halves import BLOCK, COLUMNS
from .library import fp8_products
from .row import LOW_HALF
from .shapes import (
    BIAS,
    SCALE,
    WEIGHT,
    WGMMA,
    X_SCALE,
    ZERO,
    Shape,
    X,
    in_pairs,
    row_shapes,
    scaled_shapes,
    slice_shapes,
    tile_shapes,
)

FEWEST_DEQUANTISED = 256  # rows from which reading and writing the whole weight may be a small part
PIECE = 32  # rows of a scaled tile that are added up at a time
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
    found = [_row(site, activation, *shape) for shape in row_shapes(site)]
    found += [_few(site, activation, shape) for shape in slice_shapes(site)]
    found += [_tiles(site, activation, *how) for how in tile_shapes(site)]
    found += [_scaled(site, activation, *how) for how in scaled_shapes(site)]
    return list({tactic.name: tactic for tactic in found}.values())


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
    # tensor cores that take the second side from shared memory, and what was converted from registers
    groups = site.device.capability == WGMMA and not warps % 4 and not bn % 64
    halves = groups and in_pairs(site) and not depth % COLUMNS
    waits = groups and x.dtype in ("bfloat16", "float16") and not site.attributes["group"]
    share = triton.cdiv(triton.cdiv(depth, parts), bk) * bk
    parts = triton.cdiv(depth, share)
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, block)
    lines = Tensor((min(share, bk * stages),), weight.dtype).num_bytes // 128  # what is in flight a moment later
    constants = _constants(site, activation) | {
        "N": width, "K": depth, "BM": bm, "BN": bn, "BK": bk, "DEPTH": share, "PARTS": parts,
        "EVEN": columns % block == 0 and depth % bk == 0, "AHEAD": 1 << lines.bit_length() >> 1,
        "HALVES": halves, "WAITS": waits,
    }  # fmt: skip
    signature = (*_signature(site), ("parts", "*fp32"), ("arrived", "*i32"), ("M", "i32"))
    kernel = Kernel("quantised_linear.tile:quantised_kernel", signature, tuple(constants.items()), warps, stages,
                    divisible=_aligned(site))  # fmt: skip
    launches, (x_at, *others), used = [], _operands(site), 0
    if halves:
        used = _aligned_bytes(x)
        launches.append(_taken_apart(x, x_at, together=False))
        x_at = Operand("workspace", 0)
    # a single part needs neither room nor counters: any pointer will do
    room = (Operand("workspace", used), Operand("zeros", 0)) if parts > 1 else (Operand("output", 0),) * 2
    launches.append(Launch(kernel, (tiles, parts, 1), (x_at, *others, Operand("output", 0), *room, rows)))
    name = f"{bm}x{bn}x{bk} warps{warps} stages{stages} parts{parts}"
    return Tactic(name, tuple(launches), used + 4 * parts * rows * width if parts > 1 else used,
                  4 * tiles if parts > 1 else 0)  # fmt: skip


def _scaled(site: Site, activation: str, shape: Shape, parts: int) -> Tactic:
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    (bm, bn, bk, warps, stages), rows, (width, depth) = shape, x.shape[0], weight.shape
    share = triton.cdiv(triton.cdiv(depth, parts), bk) * bk
    parts = triton.cdiv(depth, share)
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(columns, block)
    constants = {
        "N": width, "K": depth, "BM": bm, "BN": bn, "BK": bk, "DEPTH": share, "PARTS": parts, "PIECE": PIECE,
        "ZERO": site.inputs[ZERO] is not None, "GROUP": site.attributes["group"],
        "BIAS": site.inputs[BIAS] is not None, "EVEN": columns % block == 0 and depth % bk == 0,
        "WHOLE": rows % bm == 0, "ACTIVATION": activation,
        "AHEAD": 1 << (min(share, bk * stages) // 256).bit_length() >> 1,
    }  # fmt: skip
    names = "x", "weight", "scale", "zero", "bias", "y"
    signature = tuple(each for each in _signature(site) if each[0] in names)
    kernel = Kernel("quantised_linear.scaled:quantised_scaled_kernel",
                    (*signature, ("parts", "*fp32"), ("arrived", "*i32"), ("M", "i32")), tuple(constants.items()),
                    warps, stages, divisible=(*_aligned(site), "parts"))  # fmt: skip
    x_at, *others = _operands(site)
    used = _aligned_bytes(x)
    room = (Operand("workspace", used), Operand("zeros", 0)) if parts > 1 else (Operand("output", 0),) * 2
    operands: tuple[Operand | int, ...] = (*others[: X_SCALE - 1], others[BIAS - 1], Operand("output", 0), *room, rows)
    launches = (
        _taken_apart(x, x_at, together=True),
        Launch(kernel, (tiles, parts, 1), (Operand("workspace", 0), *operands)),
    )
    name = f"scaled {bm}x{bn}x{bk} warps{warps} stages{stages} parts{parts}"
    return Tactic(name, launches, used + 4 * tiles * parts * bm * bn if parts > 1 else used,
                  4 * tiles if parts > 1 else 0)  # fmt: skip


def _taken_apart(x: Tensor, at: Operand, together: bool) -> Launch:
    """x, which is `at`, in even and odd columns at the start of the workspace."""
    (rows, depth), pointer = x.shape, POINTERS[x.dtype]
    kernel = Kernel("quantised_linear.halves:halves_kernel", (("x", pointer), ("y", pointer), ("M", "i32")),
                    (("K", depth), ("BLOCK", BLOCK), ("TOGETHER", together)), divisible=("x", "y"))  # fmt: skip
    return Launch(kernel, (triton.cdiv(rows * depth, 2 * BLOCK), 1, 1), (at, Operand("workspace", 0), rows))


def _few(site: Site, activation: str, shape: Shape) -> Tactic:
    x, weight = site.inputs[X], site.inputs[WEIGHT]
    assert x is not None and weight is not None
    (bm, bn, slice, warps, stages), rows, (width, depth) = shape, x.shape[0], weight.shape
    columns, block = (width // 2, bn // 2) if activation else (width, bn)
    constants = {
        "N": width, "K": depth, "BM": bm, "BN": bn, "SLICE": slice, "SLICES": warps,
        "ZERO": site.inputs[ZERO] is not None, "GROUP": site.attributes["group"],
        "BIAS": site.inputs[BIAS] is not None, "EVEN": columns % block == 0 and depth % (slice * warps) == 0,
        "ACTIVATION": activation, "AHEAD": 1 << (stages * slice * warps // 256).bit_length() >> 1,
    }  # fmt: skip
    names = "x", "weight", "scale", "zero", "bias", "y"
    signature = tuple(each for each in _signature(site) if each[0] in names)
    kernel = Kernel("quantised_linear.few:quantised_few_kernel", (*signature, ("M", "i32")),
                    tuple(constants.items()), warps, stages, divisible=_aligned(site))  # fmt: skip
    operands = _operands(site)
    launch = Launch(kernel, (triton.cdiv(columns, block), triton.cdiv(rows, bm), 1),
                    (*operands[:X_SCALE], operands[BIAS], Operand("output", 0), rows))  # fmt: skip
    return Tactic(f"few {bm}x{bn}x{slice} warps{warps} stages{stages}", (launch,))


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
