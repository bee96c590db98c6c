"""act(gate) * up on the GPU, a block of columns of one row a program; the activation is rounded before the product."""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic

BLOCK = 1024


@triton.jit
def gated_activation_kernel(
    x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr = False
):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2z)
        active = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        active = tl.maximum(gate, 0.0)
    active = active.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * WIDTH + i, (active * up).to(y.dtype.element_ty), mask=inside)


def tactics(site: Site) -> list[Tactic]:
    """One launch of rows x column blocks; [] for an activation it does not know."""
    x, activation = site.inputs[0], site.attributes["activation"]
    assert x is not None
    if activation not in ("silu", "gelu", "gelu_tanh", "relu"):
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
