"""RMSNorm on the GPU: one program a chunk, read once, kept in registers between the sum of squares and the scaling.

Rounds where the reference does: the sum with the residual before it is squared, the normalised value before the weight
unless the weight is multiplied in fp32.
"""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic


@triton.jit
def rms_norm_kernel(
    x, weight, residual, y, total,
    D: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr, OFFSET: tl.constexpr, FP32_MULTIPLY: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    at = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, BLOCK)
    inside = i < D
    h = tl.load(x + at + i, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        h += tl.load(residual + at + i, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(y.dtype.element_ty)
        tl.store(total + at + i, rounded, mask=inside)
        h = rounded.to(tl.float32)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / D + EPSILON)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if not FP32_MULTIPLY:
        h = h.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at + i, (h * (w + OFFSET)).to(y.dtype.element_ty), mask=inside)


def tactics(site: Site) -> list[Tactic]:
    """One launch of rows * chunks programs."""
    x, weight, residual = site.inputs
    assert x is not None and weight is not None
    size, offset = weight.shape[0], site.attributes["weight_offset"]
    block = triton.next_power_of_2(size)
    pointer = POINTERS[x.dtype]
    names = ("x", "weight", "residual", "y", "total")
    constants = {
        "D": size, "BLOCK": block, "EPSILON": site.attributes["epsilon"], "OFFSET": float(offset),
        "FP32_MULTIPLY": bool(offset or site.attributes["fp32_multiply"]), "RESIDUAL": residual is not None,
    }  # fmt: skip
    # without a residual its pointers are never read: any will do
    arguments = (
        Operand("input", 0), Operand("input", 1), Operand("input", 2 if residual else 0),
        Operand("output", 0), Operand("output", 1 if residual else 0),
    )  # fmt: skip
    grid = (x.shape[0] * (x.shape[1] // size), 1, 1)
    return [
        Tactic(f"warps{warps}", (Launch(
            Kernel("rms_norm.kernel:rms_norm_kernel", tuple((name, pointer) for name in names),
                   tuple(constants.items()), num_warps=warps, divisible=names if size % 16 == 0 else ()),
            grid, arguments),))
        for warps in ((4, 8) if block >= 2048 else (1, 2) if block <= 256 else (4, 2))
    ]  # fmt: skip
