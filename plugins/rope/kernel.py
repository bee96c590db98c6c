"""Rotary embedding on the GPU: a block of columns of one row a program, each column with its partner.

Arithmetic in the type C of cos_sin, as the reference's: each product and the sum are rounded to it, then to x's type.
"""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic

BLOCK = 512


@triton.jit
def rotated(
    x, table, row, column,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Some columns of a row [WIDTH] of x, heads before column TURNED rotated; zeros past WIDTH."""
    inside = column < WIDTH
    j = column % HEAD_DIM - OFFSET  # among the rotated columns of its head
    turned = (column < TURNED) & (j >= 0) & (j < ROTARY)
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        first, pair = j % 2 == 0, j // 2
        partner = tl.where(first, column + 1, column - 1)
    else:
        first, pair = j < HALF, j % HALF
        partner = tl.where(first, column + HALF, column - HALF)
    C: tl.constexpr = table.dtype.element_ty
    own = tl.load(x + row * WIDTH + column, mask=inside, other=0.0)
    other = tl.load(x + row * WIDTH + partner, mask=inside & turned, other=0.0).to(tl.float32)
    cosine = tl.load(table + row * ROTARY + pair, mask=inside & turned, other=0.0).to(tl.float32)
    sine = tl.load(table + row * ROTARY + HALF + pair, mask=inside & turned, other=0.0).to(tl.float32)
    a = (own.to(tl.float32) * cosine).to(C).to(tl.float32)
    b = (other * sine).to(C).to(tl.float32)
    return tl.where(turned, tl.where(first, a - b, a + b).to(C).to(own.dtype), own)


@triton.jit
def rope_kernel(
    x, table, y,
    WIDTH: tl.constexpr, TURNED: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, OFFSET: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = rotated(x, table, row, column, WIDTH, TURNED, HEAD_DIM, ROTARY, OFFSET, INTERLEAVED)
    tl.store(y + row * WIDTH + column, value, mask=column < WIDTH)


def tactics(site: Site) -> list[Tactic]:
    """One launch of rows x column blocks."""
    x, table = site.inputs
    assert x is not None and table is not None
    rows, width = x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    a = site.attributes
    constants = {
        "WIDTH": width, "TURNED": a["num_heads"] * a["head_dim"], "HEAD_DIM": a["head_dim"],
        "ROTARY": table.shape[1], "OFFSET": a["rotary_offset"],
        "INTERLEAVED": bool(a["interleaved"]), "BLOCK": block,
    }  # fmt: skip
    signature = (("x", POINTERS[x.dtype]), ("table", POINTERS[table.dtype]), ("y", POINTERS[x.dtype]))
    kernel = Kernel("rope.kernel:rope_kernel", signature, tuple(constants.items()), divisible=("x", "table", "y"))
    arguments = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    return [Tactic("rows", (Launch(kernel, (rows, triton.cdiv(width, block), 1), arguments),))]
