"""What lies between a projection and the attention: a region of the graph that is linear in one value.

Walked by the kinds of its ops (moves, signs, sums, products with tables of the positions), then computed on numbers:
fed with column numbers at position 0, where all cosines are one factor and all sines 0, it tells which columns of the
source it takes. So heads cut out of a packed projection in any order need no pattern.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ...plugins.dtypes import TORCH_DTYPES
from .graph import LARGEST_CONSTANT, constant_of, dims, evaluate, scalar_of, size

MOVES = frozenset("Cast Concat Expand Gather Identity Neg Reshape Slice Split Squeeze Transpose Unsqueeze".split())
TABLE_OPS = MOVES | frozenset("Add Cos Div MatMul Mul Sin Sub".split())
DIGIT = 16  # column numbers are read in digits that every float type holds with room for a factor


@dataclass(frozen=True)
class Region:
    """`result` is linear in `source` [T, W]: moves, signs, and products with `tables`, which the positions give."""

    source: ir.Value
    result: ir.Value
    tables: frozenset[ir.Value]
    positions: ir.Value

    @property
    def dtype(self) -> torch.dtype:
        assert self.source.dtype is not None
        return TORCH_DTYPES[int(self.source.dtype)]

    def compute(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """The result for x [T, W] at positions [T]; None if the region cannot be computed by itself."""
        try:
            return evaluate(self.result, {self.source: x, self.positions: positions})
        except (LookupError, RuntimeError):  # an op without a torch form, or a shape bound to the traced lengths
            return None

    def columns(self) -> tuple[np.ndarray, float] | None:
        """The source column that each result column is at position 0, and the one factor on all of them.

        Token t of the probe holds digit t of each column's number; the last token holds ones, which shows the factor.
        """
        width = size(self.source, 1)
        numbers = torch.arange(width)
        digits: list[torch.Tensor] = []
        while not digits or DIGIT ** len(digits) < width:
            digits.append(numbers // DIGIT ** len(digits) % DIGIT)
        x = torch.stack([*digits, torch.ones_like(numbers)]).to(self.dtype)
        y = self.compute(x, torch.zeros(len(x), dtype=torch.int32))
        if y is None or y.dim() != 2 or len(y) != len(x):
            return None
        factor = float(y[-1, 0])
        if factor <= 0 or not bool((y[-1] == factor).all()):
            return None
        places = torch.tensor([DIGIT**place for place in range(len(digits))])
        columns = (places @ (y[:-1].double() / factor).round().long()).numpy()
        return (columns, factor) if columns.min() >= 0 and columns.max() < width else None

    def only_moves(self, columns: np.ndarray, factor: float) -> bool:
        """Whether `source[:, columns] * factor` is all that the region does, on random numbers."""
        if self.tables:
            return False
        x = torch.randn(3, size(self.source, 1), generator=torch.Generator().manual_seed(0)).to(self.dtype)
        y = self.compute(x, torch.zeros(3, dtype=torch.int32))
        return y is not None and agree(y, x[:, columns] * factor)


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit in 16-bit types, where a wrong rounding order shows; to the last bits in fp32."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) if a.dtype is not torch.float32 else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def tables_of(model: ir.Model, positions: ir.Value) -> set[ir.Value]:
    """Every value that depends on the positions and on constants and small buffers, and on nothing else."""
    tables = {positions}
    fixed: set[ir.Value] = set()  # what is made of constants and buffers alone: inv_freq under another shape
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in TABLE_OPS and inputs:
            moving = {value for value in inputs if value in tables}
            if all(v in moving or v in fixed or constant_of(v) is not None or _is_buffer(v) for v in inputs):
                (tables if moving else fixed).update(node.outputs)
    return tables


def _is_buffer(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and tensor.size <= LARGEST_CONSTANT


def region_of(result: ir.Value, tables: set[ir.Value], positions: ir.Value) -> Region | None:
    """Walks up from `result` through linear ops; None unless it ends at exactly one 2-D value (and tables)."""
    sources: set[ir.Value] = set()
    used: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    waiting = [result]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        inputs = [] if node is None else [v for v in node.inputs if v is not None and constant_of(v) is None]
        data = [v for v in inputs if v not in tables]
        if node is not None and _is_linear(node, len(data), len(inputs)):
            waiting += data
            used.update(v for v in inputs if v in tables)
        else:
            sources.add(value)
    source = sources.pop() if len(sources) == 1 else None
    if source is None or len(dims(source)) != 2 or not isinstance(dims(source)[1], int):
        return None
    return Region(source, result, frozenset(used), positions)


def _is_linear(node: ir.Node, num_data: int, num_inputs: int) -> bool:
    """Whether the node is linear in its data inputs, the others being tables (counted in `num_inputs`) or constants."""
    match node.op_type:
        case "Add" | "Sub":
            return num_data == 2
        case "Mul":
            return num_data == 1 and (num_inputs == 2 or any(scalar_of(value) is not None for value in node.inputs))
    return node.op_type in MOVES and num_data == num_inputs > 0
