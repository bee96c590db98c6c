"""Copies of rows on the GPU: a launch for each matrix that is read or written, a block of columns of a row a program.

Sites, all tensors of one element type, slots [T] int32:

    Concat      x [T, W], ..                           ->  y [T, sum of all W]      the last axis alone
    KeepStates  states [T, W], slots                   ->  pool [num_slots, W]      written at the slots
    ReadStates  slots, pool [num_slots, W], ..         ->  y [T, sum of all W]

A pool has as many rows as there are slots when the engine opens, whatever its shape says here.
"""

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

BLOCK = 1024


@triton.jit
def rows_kernel(
    x, slots, y, WIDTH: tl.constexpr, X_WIDTH: tl.constexpr, Y_WIDTH: tl.constexpr, READ: tl.constexpr,
    WRITE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """READ: rows of x are those of the slots; WRITE: those of y are. Rows are X_WIDTH and Y_WIDTH elements apart."""
    begin(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source, target = t, t
    if READ:
        source = tl.load(slots + t).to(tl.int64)
    if WRITE:
        target = tl.load(slots + t).to(tl.int64)
    tl.store(y + target * Y_WIDTH + i, tl.load(x + source * X_WIDTH + i, mask=i < WIDTH), mask=i < WIDTH)


def tactics(site: Site) -> list[Tactic]:
    """One way; [] for a Concat along another axis than the last of two, or of several types."""
    out = site.outputs[0]
    inputs = [tensor for tensor in site.inputs if tensor is not None]
    match site.op:
        case "KeepStates":
            launches = [_copy(inputs[0], out, Operand("input", 0), Operand("input", 1), Operand("output", 0), write=1)]
        case "ReadStates":
            launches = _side_by_side(inputs, 1, out, inputs[0].shape[0])
        case _:
            alike = len(inputs) == len(site.inputs) and {tensor.dtype for tensor in inputs} == {out.dtype}
            if not alike or len(out.shape) != 2 or site.attributes["axis"] not in (1, -1) or out.dtype not in POINTERS:
                return []
            launches = _side_by_side(inputs, 0, out, out.shape[0])
    return [Tactic("rows", tuple(launches))]


def _side_by_side(inputs: list[Tensor], first: int, out: Tensor, rows: int) -> list[Launch]:
    """A launch for each of inputs `first` and behind; `first` 1: input 0 is the slots that they are read at."""
    launches, column = [], 0
    for number in range(first, len(inputs)):
        x, y = inputs[number], Operand("output", 0, Tensor((column,), out.dtype).num_bytes)
        launches.append(_copy(x, out, Operand("input", number), Operand("input", 0), y, read=first, rows=rows))
        column += x.shape[1]
    return launches


def _copy(
    x: Tensor, y: Tensor, source: Operand, slots: Operand, target: Operand, read: int = 0, write: int = 0, rows: int = 0
) -> Launch:
    """Of all columns of x; `slots` is any operand where neither is read or written by them."""
    width, pointer = x.shape[1], POINTERS["uint8" if x.dtype.startswith("float8") else x.dtype]
    by_slot = bool(read or write)
    # columns begin at any multiple of the widths before them
    vectors = ("x", "y") if width % 16 == 0 and target.offset % 16 == 0 else ()
    kernel = Kernel(
        "rows.kernel:rows_kernel",
        (("x", pointer), ("slots", "*i32" if by_slot else pointer), ("y", pointer)),
        (("WIDTH", width), ("X_WIDTH", width), ("Y_WIDTH", y.shape[1]), ("READ", read), ("WRITE", write),
         ("BLOCK", min(BLOCK, triton.next_power_of_2(width)))),
        divisible=vectors,
    )  # fmt: skip
    grid = (rows or x.shape[0], triton.cdiv(width, min(BLOCK, triton.next_power_of_2(width))), 1)
    return Launch(kernel, grid, (source, slots, target))
