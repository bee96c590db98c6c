"""Gather over axis 0 on the GPU: a block of columns of one output row a program."""

from math import prod

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic

BLOCK = 1024


@triton.jit
def gather_kernel(
    data, indices, y, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False
):
    begin(PDL)
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + at).to(tl.int64)
    row = tl.where(row < 0, row + ROWS, row)  # ONNX counts negative indices from the end
    row = tl.minimum(tl.maximum(row, 0), ROWS - 1)  # padding may hold anything
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < WIDTH
    tl.store(y + at * WIDTH + i, tl.load(data + row * WIDTH + i, mask=inside), mask=inside)


def tactics(site: Site) -> list[Tactic]:
    """data [N, ..], indices [..] (int32 or int64) -> [indices.., ..]; [] for another axis than the first."""
    data, indices = site.inputs[:2]
    assert data is not None and indices is not None
    axis = site.attributes.get("axis", 0)
    supported = data.dtype in POINTERS and indices.dtype in ("int32", "int64")
    if axis not in (0, -len(data.shape)) or not supported or 0 in data.shape or 0 in indices.shape:
        return []
    rows, width = data.shape[0], prod(data.shape[1:])
    if data.dtype == "int4":  # bytes of two numbers
        if width % 2:
            return []
        width //= 2
    block = min(BLOCK, triton.next_power_of_2(width))
    pointer = POINTERS["uint8" if data.dtype.startswith("float8") else data.dtype]  # a copy knows no float8
    kernel = Kernel(
        "gather.kernel:gather_kernel",
        (("data", pointer), ("indices", POINTERS[indices.dtype]), ("y", pointer)),
        (("ROWS", rows), ("WIDTH", width), ("BLOCK", block)),
        divisible=("data", "y"),
    )
    grid = (prod(indices.shape), triton.cdiv(width, block), 1)
    arguments = (Operand("input", 0), Operand("input", 1), Operand("output", 0))
    return [Tactic("rows", (Launch(kernel, grid, arguments),))]
