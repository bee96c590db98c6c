"""Copies of rows on the GPU: a launch for each matrix that is read or written, a block of columns of a row a program.

Sites, all tensors of one element type, slots [T] int32:

    Concat      x [T, W], ..                           ->  y [T, sum of all W]      the last axis alone
    KeepStates  states [T, W], slots                   ->  pool [num_slots, W]      written at the slots
    ReadStates  slots, pool [num_slots, W], ..         ->  y [T, sum of all W]
    MoveRows    pool, moves [N, 2] int32               ->  pool     row moves[i, 0] over row moves[i, 1], if not below 0

A pool has as many rows as there are slots when the engine opens, whatever its shape says here; one of MoveRows may be
[pages, page size, ..]. No row of MoveRows is both read and written.
"""

import math

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


@triton.jit
def move_kernel(pool, moves, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (moves, blocks of columns)."""
    begin(PDL)
    move = moves + 2 * tl.program_id(0)
    source = tl.load(move).to(tl.int64)
    if source < 0:
        return
    target = tl.load(move + 1).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pool + target * WIDTH + i, tl.load(pool + source * WIDTH + i, mask=i < WIDTH), mask=i < WIDTH)


def tactics(site: Site) -> list[Tactic]:
    """One way; [] for a Concat along another axis than the last of two, or of several types."""
    out = site.outputs[0]
    inputs = [tensor for tensor in site.inputs if tensor is not None]
    match site.op:
        case "KeepStates":
            launches = [_copy(inputs[0], out, Operand("input", 0), Operand("input", 1), Operand("output", 0), write=1)]
        case "ReadStates":
            launches = _side_by_side(inputs, 1, out, inputs[0].shape[0])
        case "MoveRows":
            launches = [_move(inputs[0], inputs[1].shape[0])]
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
    width, pointer = x.shape[1], _pointer(x)
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


def _move(pool: Tensor, num: int) -> Launch:
    width = math.prod(pool.shape[2:] if len(pool.shape) > 2 else pool.shape[1:])
    block = min(BLOCK, triton.next_power_of_2(width))
    kernel = Kernel(
        "rows.kernel:move_kernel", (("pool", _pointer(pool)), ("moves", "*i32")), (("WIDTH", width), ("BLOCK", block)),
        divisible=("pool",) if width % 16 == 0 else (),
    )  # fmt: skip
    return Launch(kernel, (num, triton.cdiv(width, block), 1), (Operand("output", 0), Operand("input", 1)))


def _pointer(tensor: Tensor) -> str:
    return POINTERS["uint8" if tensor.dtype.startswith("float8") else tensor.dtype]
