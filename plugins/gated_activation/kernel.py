"""act(gate) * up on the GPU, a block of columns of one row a program; the activation is rounded before the product."""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic
from .activate import ACTIVATIONS, gate

BLOCK = 1024


@triton.jit
def gated_activation_kernel(
    x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr = False
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gates = tl.load(x + row * 2 * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(x + row * 2 * WIDTH + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + i, gate(gates, ups, ACTIVATION, y.dtype.element_ty), mask=inside)


def tactics(site: Site) -> list[Tactic]:
    """One launch of rows x column blocks; [] for an activation it does not know."""
    x, activation = site.inputs[0], site.attributes["activation"]
    assert x is not None
    if activation not in ACTIVATIONS:
        return []
    rows, width = x.shape[0], x.shape[1] // 2
    pointer, block = POINTERS[x.dtype], min(BLOCK, triton.next_power_of_2(width))
    kernel = Kernel(
        "gated_activation.kernel:gated_activation_kernel",
        (("x", pointer), ("y", pointer)),
        (("WIDTH", width), ("BLOCK", block), ("ACTIVATION", activation)),
        divisible=("x", "y"),
    )
    grid = (rows, triton.cdiv(width, block), 1)
    return [Tactic("rows", (Launch(kernel, grid, (Operand("input", 0), Operand("output", 0))),))]
