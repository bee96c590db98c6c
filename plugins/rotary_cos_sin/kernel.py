"""cos | sin of position * inv_freq on the GPU, in fp32, one row a program."""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic


@triton.jit
def rotary_cos_sin_kernel(
    positions, inv_freq, y, HALF: tl.constexpr, BLOCK: tl.constexpr, SCALING: tl.constexpr, PDL: tl.constexpr = False
):
    begin(PDL)
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + i, mask=inside, other=0.0)
    tl.store(y + row * 2 * HALF + i, (tl.cos(angle) * SCALING).to(y.dtype.element_ty), mask=inside)
    tl.store(y + row * 2 * HALF + HALF + i, (tl.sin(angle) * SCALING).to(y.dtype.element_ty), mask=inside)


def tactics(site: Site) -> list[Tactic]:
    """One launch of T programs."""
    positions, inv_freq = site.inputs
    assert positions is not None and inv_freq is not None
    half = inv_freq.shape[0]
    constants = (("HALF", half), ("BLOCK", triton.next_power_of_2(half)),
                 ("SCALING", float(site.attributes["attention_scaling"])))  # fmt: skip
    signature = (
        ("positions", POINTERS[positions.dtype]),
        ("inv_freq", "*fp32"),
        ("y", POINTERS[site.outputs[0].dtype]),
    )
    kernel = Kernel("rotary_cos_sin.kernel:rotary_cos_sin_kernel", signature, constants, num_warps=1)
    arguments = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    return [Tactic("rows", (Launch(kernel, (positions.shape[0], 1, 1), arguments),))]
