"""act(gate) * up and QuantiseTokens on the GPU in one launch: a token a program."""

import triton
import triton.language as tl

from ..gated_activation.activate import ACTIVATIONS, gate
from ..pdl import begin
from ..quantise_tokens.kernel import ELEMENTS
from ..quantise_tokens.store import store_token
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic


@triton.jit
def quantised_gated_activation_kernel(
    x, values, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    gates = tl.load(x + row * 2 * WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(x + row * 2 * WIDTH + WIDTH + i, mask=inside, other=0.0).to(tl.float32)
    y = gate(gates, ups, ACTIVATION, x.dtype.element_ty).to(tl.float32)
    store_token(tl.where(inside, y, 0.0), values, scale, row, WIDTH, BLOCK, GROUP)


def tactics(site: Site) -> list[Tactic]:
    """A program a token; [] for an activation that it does not know, or groups that are no power of two."""
    x, values, group = site.inputs[0], site.outputs[0], site.attributes["group"]
    assert x is not None
    activation, width = site.attributes["activation"], x.shape[1] // 2
    if activation not in ACTIVATIONS or group & (group - 1) or values.dtype not in ELEMENTS:
        return []
    block = max(group, triton.next_power_of_2(width))
    signature = (("x", POINTERS[x.dtype]), ("values", POINTERS[values.dtype]), ("scale", "*fp32"))
    constants = (("WIDTH", width), ("BLOCK", block), ("ACTIVATION", activation), ("GROUP", group))
    arguments = (Operand("input", 0), Operand("output", 0), Operand("output", 1))
    return [
        Tactic(f"warps{warps}", (Launch(
            Kernel("quantised_gated_activation.kernel:quantised_gated_activation_kernel", signature, constants,
                   num_warps=warps, divisible=("x", "values") if width % 16 == 0 else ()),
            (x.shape[0], 1, 1), arguments),))
        for warps in ((16, 8) if block >= 8192 else (8, 4) if block >= 2048 else (4, 2))
    ]  # fmt: skip
