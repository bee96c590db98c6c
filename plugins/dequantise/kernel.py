"""(x - zero) * scale in fp32, rounded once: a block of columns of one row a program."""

from typing import Any

import triton
import triton.language as tl

from ..pdl import begin
from ..quantised_linear.numbers import HARDWARE_FP8, byte, half_byte, zero_points
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

BLOCK = 1024  # columns
KINDS = {"int4": "int4", "int8": "int8", "float8_e4m3fn": "fp8"}


@triton.jit
def dequantise_kernel(
    x, scale, zero, y, K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """KIND: see `../quantised_linear/numbers.py`. SCALE: one, rows or groups of GROUP columns. K is even for int4."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    if KIND == "int4":
        pair = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        w = tl.load(x + row * (K // 2) + pair, mask=pair * 2 < K, other=0)
        v = tl.reshape(tl.join(half_byte(w & 15, tl.float32), half_byte(w >> 4, tl.float32)), [BLOCK])
    else:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        v = byte(tl.load(x + row * K + at, mask=at < K, other=0.0), KIND, tl.float32)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    if SCALE == "groups":
        at = row * ((K + GROUP - 1) // GROUP) + k // GROUP
    elif SCALE == "rows":
        at = row + k * 0
    else:
        at = k * 0
    if ZERO:
        v -= zero_points(zero, at, inside, KIND)
    v *= tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * K + k, v.to(y.dtype.element_ty), mask=inside)


def kind_of(tensor: Tensor, capability: int) -> str:
    """What the kernels call the tensor's numbers; "" for none in few bits."""
    kind = KINDS.get(tensor.dtype, "")
    return "bits" if kind == "fp8" and capability < HARDWARE_FP8 else kind


def pointer_of(tensor: Tensor, capability: int) -> str:
    """The Triton type of its pointer there."""
    return "*u8" if kind_of(tensor, capability) == "bits" else POINTERS[tensor.dtype]


def dequantise(
    x: Tensor, scale: Tensor, zero: Tensor | None, y: Tensor, how: tuple[str, int], capability: int,
    operands: tuple[Operand, Operand, Operand, Operand],
) -> Launch:  # fmt: skip
    """x, scale, zero and y at `operands`. how: (one, rows or groups; the group)."""
    rows, depth = x.shape
    signature = (("x", pointer_of(x, capability)), ("scale", POINTERS[scale.dtype]),
                 ("zero", POINTERS[(zero or x).dtype]), ("y", POINTERS[y.dtype]))  # fmt: skip
    if zero is None:
        signature = (*signature[:2], ("zero", pointer_of(x, capability)), signature[3])
    block = min(BLOCK, max(16, triton.next_power_of_2(depth)))
    constants: dict[str, Any] = {"K": depth, "BLOCK": block, "KIND": kind_of(x, capability), "ZERO": zero is not None,
                                 "GROUP": how[1], "SCALE": how[0]}  # fmt: skip
    kernel = Kernel("dequantise.kernel:dequantise_kernel", signature, tuple(constants.items()),
                    divisible=("x", "y") if depth % 32 == 0 else ())  # fmt: skip
    return Launch(kernel, (rows, -(-depth // block), 1), operands)


def tactics(site: Site) -> list[Tactic]:
    """A matrix with one scale for all, for each row, or for groups of columns; [] for other shapes."""
    x, scale, *rest = site.inputs
    assert x is not None and scale is not None
    zero = rest[0] if rest else None
    if len(x.shape) != 2 or not kind_of(x, site.device.capability) or (x.dtype == "int4" and x.shape[1] % 2):
        return []
    axis, group = site.attributes.get("axis", 1) % 2, site.attributes.get("block_size", 0)
    count = 1
    for size in scale.shape:
        count *= size
    if count == 1:
        how = ("one", 0)
    elif group and axis == 1:
        how = ("groups", group) if scale.shape[1] > 1 else ("rows", 0)
    elif axis == 0 and not group and count == x.shape[0]:
        how = ("rows", 0)
    else:
        return []
    operands = (Operand("input", 0), Operand("input", 1), Operand("input", 2 if zero else 0), Operand("output", 0))
    return [Tactic("rows", (dequantise(x, scale, zero, site.outputs[0], how, site.device.capability, operands),))]
