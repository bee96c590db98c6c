"""RMSNorm and QuantiseTokens on the GPU in one launch: a token a program, in registers from its sum to its 8 bits."""

import triton
import triton.language as tl

from ..pdl import launch_next, wait
from ..quantise_tokens.kernel import ELEMENTS
from ..quantise_tokens.store import store_token
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic


@triton.jit
def quantised_rms_norm_kernel(
    x, weight, residual, values, scale, total,
    D: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr, OFFSET: tl.constexpr, FP32_MULTIPLY: tl.constexpr,
    RESIDUAL: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    w = tl.load(weight + i, mask=inside, other=0.0)  # from memory, which takes longer than all that follows
    wait(PDL)
    h = tl.load(x + row * D + i, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        h += tl.load(residual + row * D + i, mask=inside, other=0.0).to(tl.float32)
        both = h.to(x.dtype.element_ty)
        tl.store(total + row * D + i, both, mask=inside)
        h = both.to(tl.float32)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / D + EPSILON)
    if not FP32_MULTIPLY:
        h = h.to(x.dtype.element_ty).to(tl.float32)
    y = (h * (w.to(tl.float32) + OFFSET)).to(x.dtype.element_ty)
    store_token(tl.where(inside, y.to(tl.float32), 0.0), values, scale, row, D, BLOCK, GROUP)


def tactics(site: Site) -> list[Tactic]:
    """A program a token; [] for groups that are no power of two."""
    x, weight, residual = site.inputs
    assert x is not None and weight is not None
    size, group, values = weight.shape[0], site.attributes["group"], site.outputs[0]
    if x.shape[1] != size or group & (group - 1) or values.dtype not in ELEMENTS:
        return []
    offset, block = site.attributes["weight_offset"], max(group, triton.next_power_of_2(size))
    pointer = POINTERS[x.dtype]
    signature = (("x", pointer), ("weight", pointer), ("residual", pointer), ("values", POINTERS[values.dtype]),
                 ("scale", "*fp32"), ("total", pointer))  # fmt: skip
    constants = {
        "D": size, "BLOCK": block, "EPSILON": site.attributes["epsilon"], "OFFSET": float(offset),
        "FP32_MULTIPLY": bool(offset or site.attributes["fp32_multiply"]), "RESIDUAL": residual is not None,
        "GROUP": group,
    }  # fmt: skip
    # without a residual its pointers are never read: any will do
    arguments = (
        Operand("input", 0), Operand("input", 1), Operand("input", 2 if residual else 0), Operand("output", 0),
        Operand("output", 1), Operand("output", 2) if residual else Operand("input", 0),
    )  # fmt: skip
    aligned = tuple(name for name, _ in signature) if size % 16 == 0 else ()
    return [
        Tactic(f"warps{warps}", (Launch(
            Kernel("quantised_rms_norm.kernel:quantised_rms_norm_kernel", signature, tuple(constants.items()),
                   num_warps=warps, divisible=aligned), (x.shape[0], 1, 1), arguments),))
        for warps in ((8, 4, 16) if block >= 2048 else (4, 2))
    ]  # fmt: skip
