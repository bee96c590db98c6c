"""Element-wise ONNX ops on the GPU: one kernel, the op a constant of it.

The output is seen as [rows, width]; an operand has a stride for each of the two, 0 where it is broadcast. Arithmetic is
in fp32 and rounded once to the type of the output; sums and products of integers are exact in their own type (positions
and their offsets).
"""

from math import prod

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic

BLOCK = 1024
BINARY = ("Add", "Sub", "Mul", "Div")
UNARY = ("Tanh", "Relu", "Gelu", "Sigmoid", "Sqrt", "Neg")
MOVES = ("Cast", "Identity")
FLOATS = ("float32", "bfloat16", "float16")
EXACT = ("Add", "Sub", "Mul")  # in integers, too, where all operands have the type of the output
INTEGERS = ("int32", "int64")


@triton.jit
def elementwise_kernel(
    a, b, y, size,
    OP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    A_ROW: tl.constexpr, A_COLUMN: tl.constexpr, B_ROW: tl.constexpr, B_COLUMN: tl.constexpr, B: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    if A_ROW == WIDTH and A_COLUMN == 1:
        p = tl.load(a + i, mask=inside, other=0)
    else:
        p = tl.load(a + i // WIDTH * A_ROW + i % WIDTH * A_COLUMN, mask=inside, other=0)
    if B:
        if B_ROW == WIDTH and B_COLUMN == 1:
            q = tl.load(b + i, mask=inside, other=1)
        else:
            q = tl.load(b + i // WIDTH * B_ROW + i % WIDTH * B_COLUMN, mask=inside, other=1)
    if a.dtype.element_ty.is_floating() or y.dtype.element_ty.is_floating():
        p = p.to(tl.float32)
        if B:
            q = q.to(tl.float32)
    if OP == "Add":
        p = p + q
    elif OP == "Sub":
        p = p - q
    elif OP == "Mul":
        p = p * q
    elif OP == "Div":
        p = tl.div_rn(p, q)
    elif OP == "Tanh":  # by the magnitude, so that exp cannot overflow; small values by the series, exact to fp32
        magnitude = tl.abs(p)
        e = tl.exp(-2.0 * magnitude)
        large = tl.where(p < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
        square = p * p
        series = p * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.02187))))
        p = tl.where(magnitude < 0.15, series, large)
    elif OP == "Relu":
        p = tl.where(p < 0.0, 0.0, p)  # keeps NaN
    elif OP == "Gelu":
        p = 0.5 * p * (1.0 + tl.erf(p * 0.7071067811865476))
    elif OP == "GeluTanh":  # (1 + tanh z) / 2 = sigmoid(2z)
        p = p / (1.0 + tl.exp(-1.5957691216057308 * (p + 0.044715 * p * p * p)))
    elif OP == "Sigmoid":
        p = 1.0 / (1.0 + tl.exp(-p))
    elif OP == "Sqrt":
        p = tl.sqrt_rn(p)
    elif OP == "Neg":
        p = -p
    tl.store(y + i, p.to(y.dtype.element_ty), mask=inside)


def tactics(site: Site) -> list[Tactic]:
    """One launch over the output's elements; [] for an op, type or broadcast that the kernel does not know."""
    op, out = site.op, site.outputs[0]
    operands = [x for x in site.inputs if x is not None]
    strides = [_strides(x.shape, out.shape) for x in operands]
    if op not in (*BINARY, *UNARY, *MOVES) or len(operands) != (2 if op in BINARY else 1) or 0 in out.shape:
        return []
    types = {x.dtype for x in (*operands, out)}
    exact = op in EXACT and len(types) == 1 and out.dtype in INTEGERS
    if not (exact or types <= set(POINTERS if op in MOVES else FLOATS)) or None in strides:
        return []
    if op == "Gelu" and site.attributes.get("approximate", "none") == "tanh":
        op = "GeluTanh"
    (a_row, a_column), (b_row, b_column) = (strides[0] or (0, 0)), (strides[-1] or (0, 0))
    size, width = prod(out.shape), out.shape[-1] if out.shape else 1
    block = BLOCK if size > 128 else 128  # the same for most buckets, so that they share a cubin
    kernel = Kernel(
        "elementwise.kernel:elementwise_kernel",
        (("a", POINTERS[operands[0].dtype]), ("b", POINTERS[operands[-1].dtype]), ("y", POINTERS[out.dtype]),
         ("size", "i32")),
        (("OP", "Move" if op in MOVES else op), ("WIDTH", width), ("BLOCK", block),
         ("A_ROW", a_row), ("A_COLUMN", a_column), ("B_ROW", b_row), ("B_COLUMN", b_column),
         ("B", len(operands) == 2)),
        # a scalar may lie anywhere in a file of weights
        divisible=tuple(n for n, x in (("a", operands[0]), ("b", operands[-1]), ("y", out)) if prod(x.shape) >= 16),
    )  # fmt: skip
    arguments = (Operand("input", 0), Operand("input", len(operands) - 1), Operand("output", 0), size)
    return [Tactic("flat", (Launch(kernel, (triton.cdiv(size, block), 1, 1), arguments),))]


def _strides(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, int] | None:
    """Elements between rows and between columns of an operand, the output seen as [rows, width].

    None where two strides cannot say it: an operand of three axes or more that is broadcast along some of the first.
    """
    if len(shape) > len(out):
        return None
    shape = (1,) * (len(out) - len(shape)) + shape
    if not out:
        return 0, 0
    if shape[-1] not in (1, out[-1]):
        return None
    column = 1 if shape[-1] == out[-1] else 0
    if prod(shape[:-1]) == 1:
        return 0, column
    return (shape[-1], column) if shape[:-1] == out[:-1] else None
