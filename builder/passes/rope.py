"""RoPE of every family -> `RotaryCosSin` once and one `Rope` per query and key.

Families write RoPE in a dozen ways: by halves or interleaved, on part of a head, with angles repeated before or after
the cosine, on heads cut out of a packed projection. A pattern for each would miss the next one. All are maps, linear
in x, made of moves, signs and products with a table of the positions. So the region between a projection and the
attention is found by the kinds of its ops, and then *computed* on numbers: which columns it takes, and whether it is a
`Rope` of them. Two different linear maps do not agree on random numbers, so agreement is proof, in the graph's own
type bit for bit. A region that is no Rope is left as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ...engines.step import POSITIONS
from ...plugins.dtypes import TORCH_DTYPES
from ...plugins.rope import rope
from ...plugins.rotary_cos_sin import rotary_cos_sin
from .graph import INGOT, attribute, constant, constant_of, dims, evaluate, new, nodes, scalar_of

MOVES = frozenset("Cast Concat Expand Gather Identity Neg Reshape Slice Split Squeeze Transpose Unsqueeze".split())
TABLE_OPS = MOVES | frozenset("Add Cos Div MatMul Mul Sin Sub".split())
LARGEST_BUFFER = 65536  # elements of a buffer that may lie in a table's making (inv_freq)
PROBE_POSITIONS = torch.tensor([0, 1, 2, 5, 11, 29, 57, 123], dtype=torch.int32)
DIGIT = 16  # column numbers are read in digits that every float type holds with room for a factor


@dataclass(frozen=True)
class Region:
    """`result` is linear in `source` [T, W]: moves, signs, and products with tables of the positions."""

    source: ir.Value
    result: ir.Value
    tables: frozenset[ir.Value]
    positions: ir.Value

    def compute(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        try:
            return evaluate(self.result, {self.source: x, self.positions: positions})
        except (LookupError, RuntimeError):  # an op without a torch form, or a shape bound to the traced lengths
            return None


@dataclass(frozen=True)
class Table:
    """What a `RotaryCosSin` node computes; `rounded_first` marks a table rounded to it and then widened to fp32."""

    inv_freq: torch.Tensor  # [r/2] fp32
    scaling: float
    dtype: ir.DataType
    widened: bool = False

    def compute(self, positions: torch.Tensor) -> torch.Tensor:
        table = rotary_cos_sin(positions, self.inv_freq, dtype=int(self.dtype), attention_scaling=self.scaling)
        return table.float() if self.widened else table


@dataclass(frozen=True)
class Rotation:
    """Attributes of a `Rope` node."""

    head_dim: int
    interleaved: int
    rotary_offset: int


def fuse_rope(model: ir.Model) -> None:
    """The region before each query, key and value of an attention -> its columns of the projection, and a Rope."""
    positions = next((value for value in model.graph.inputs if value.name == POSITIONS), None)
    if positions is None:
        return
    tables = _tables(model, positions)
    made: dict[tuple, ir.Value] = {}
    for node in nodes(model, "PagedAttention"):
        for index, heads, head_dim in (
            (0, "num_heads", "head_dim"),
            (1, "num_kv_heads", "head_dim"),
            (2, "num_kv_heads", "v_head_dim"),
        ):
            operand = node.inputs[index]
            region = operand and _region(operand, tables, positions)
            if region:
                _fuse(model, node, index, region, attribute(node, heads), attribute(node, head_dim), made)


def _fuse(
    model: ir.Model, node: ir.Node, index: int, region: Region, num_heads: int, head_dim: int, made: dict
) -> None:
    """Replaces input `index` of an attention node by its columns of the region's source, rotated if they were."""
    width = num_heads * head_dim
    columns, scale = _columns(region)
    dtype = region.result.dtype
    if columns is None or len(columns) != width or dtype != region.source.dtype or dtype is None:
        return
    shape = (dims(region.result)[0], width)
    if region.tables:
        found = next(_rotations(region, columns, head_dim), None)
        if found is None:
            return
        table, rotation = found
        x = _take(node, region.source, columns, shape)
        attributes = dict(head_dim=rotation.head_dim, interleaved=rotation.interleaved)
        cos_sin = _cos_sin(model, region.positions, table, made)
        x = new(
            node, "Rope", [x, cos_sin], shape, dtype, INGOT, num_heads=num_heads, **attributes,
            rotary_offset=rotation.rotary_offset,
        )  # fmt: skip
    elif scale == 1.0:
        x = _take(node, region.source, columns, shape)
    elif index == 0:  # a scaled query: the factor goes where the scores are scaled, in fp32
        x = _take(node, region.source, columns, shape)
        node.attributes["scale"] = ir.AttrFloat32("scale", attribute(node, "scale") * scale)
    else:
        return
    node.replace_input_with(index, x)


def _take(before: ir.Node, x: ir.Value, columns: np.ndarray, shape: tuple) -> ir.Value:
    """x[:, columns], x itself where that is all of it in order."""
    if np.array_equal(columns, np.arange(dims(x)[1])):  # type: ignore[arg-type]
        return x
    return new(before, "Gather", [x, constant(before, torch.from_numpy(columns))], shape, x.dtype, axis=1)


def _tables(model: ir.Model, positions: ir.Value) -> set[ir.Value]:
    """Every value that depends on the positions and on small buffers, and on nothing else."""
    tables = {positions}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in TABLE_OPS and any(value in tables for value in inputs):
            if all(value in tables or constant_of(value) is not None or _is_buffer(value) for value in inputs):
                tables.update(node.outputs)
    return tables


def _is_buffer(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and tensor.size <= LARGEST_BUFFER


def _region(result: ir.Value, tables: set[ir.Value], positions: ir.Value) -> Region | None:
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
        op_type = "" if node is None else node.op_type
        if op_type in MOVES and len(data) == len(inputs) and data:
            waiting += data
        elif op_type in ("Add", "Sub") and len(data) == 2:
            waiting += data
        elif op_type == "Mul" and len(data) == 1 and (len(inputs) == 2 or _scalar_factor(node)):
            waiting += data
            used.update(v for v in inputs if v in tables)
        else:
            sources.add(value)
    source = sources.pop() if len(sources) == 1 else None
    if source is None or len(dims(source)) != 2 or not isinstance(dims(source)[1], int):
        return None
    return Region(source, result, frozenset(used), positions)


def _scalar_factor(node: ir.Node | None) -> bool:
    return node is not None and any(scalar_of(value) is not None for value in node.inputs)


def _columns(region: Region) -> tuple[np.ndarray | None, float]:
    """The source column each result column is, at position 0 where all cosines are one factor and all sines 0.

    Token t of the probe holds digit t of each column's number and the last token holds ones, which shows the factor.
    """
    width, dtype = dims(region.source)[1], region.source.dtype
    assert isinstance(width, int) and dtype is not None
    numbers, digits = torch.arange(width), []
    while not digits or DIGIT ** len(digits) < width:
        digits.append(numbers // DIGIT ** len(digits) % DIGIT)
    x = torch.stack([*digits, torch.ones(width, dtype=torch.int64)]).to(TORCH_DTYPES[int(dtype)])
    y = region.compute(x, torch.zeros(len(x), dtype=torch.int32))
    if y is None or y.dim() != 2 or len(y) != len(x):
        return None, 1.0
    y = y.double()
    factor = float(y[-1, 0])
    if factor <= 0 or not bool((y[-1] == factor).all()):
        return None, 1.0
    read = (y[:-1] / factor).round().long()
    columns = sum(digit * DIGIT**place for place, digit in enumerate(read))
    columns = np.asarray(columns)
    if columns.min() < 0 or columns.max() >= width:
        return None, 1.0
    if not region.tables:  # no rotation: this is all the region does, which numbers must confirm
        probe = torch.randn(len(x), width).to(x.dtype)
        y = region.compute(probe, torch.zeros(len(x), dtype=torch.int32))
        if y is None or not _agree(y, probe[:, columns] * factor):
            return None, 1.0
    return columns, factor


def _rotations(region: Region, columns: np.ndarray, head_dim: int) -> Iterator[tuple[Table, Rotation]]:
    """The tables and Rope attributes with which `Rope(source[:, columns])` gives what the region gives."""
    dtype = region.source.dtype
    width = dims(region.source)[1]
    assert dtype is not None and isinstance(width, int)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(PROBE_POSITIONS), width, generator=generator).to(TORCH_DTYPES[int(dtype)])
    expected = region.compute(x, PROBE_POSITIONS)
    if expected is None:
        return
    taken = x[:, columns]
    for table in _candidate_tables(region, dtype):
        cos_sin = table.compute(PROBE_POSITIONS)
        size = cos_sin.shape[1]
        if size > head_dim:
            continue
        for offset in dict.fromkeys((0, head_dim - size)):
            for interleaved in (0, 1):
                rotation = Rotation(head_dim, interleaved, offset)
                attributes = dict(head_dim=head_dim, interleaved=interleaved, rotary_offset=offset)
                y = rope(taken, cos_sin, num_heads=taken.shape[1] // head_dim, **attributes)
                if _agree(y, expected):
                    yield table, rotation


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit in 16-bit types, where a wrong rounding order shows; to the last bits in fp32."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) if a.dtype is not torch.float32 else torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _candidate_tables(region: Region, dtype: ir.DataType) -> Iterator[Table]:
    """Tables the region may use: frequencies from its angles at position 1, the factor after its cosine, the types."""
    cosine = _upstream(region.tables, "Cos")
    if cosine is None or cosine.inputs[0] is None:
        return
    try:
        angles = evaluate(cosine.inputs[0], {region.positions: torch.ones(1, dtype=torch.int32)}).flatten()
    except (LookupError, RuntimeError):
        return
    scaling = 1.0
    for use in cosine.outputs[0].uses():
        factors = [scalar_of(value) for value in use.node.inputs]
        if use.node.op_type == "Mul" and any(factor is not None for factor in factors):
            scaling = next(float(factor) for factor in factors if factor is not None)
    half = len(angles) // 2
    forms = []
    if torch.equal(angles[:half], angles[half:]):
        forms.append(angles[:half])
    if len(angles) % 2 == 0 and torch.equal(angles[0::2], angles[1::2]):
        forms.append(angles[0::2])
    for inv_freq in (*forms, angles):
        inv_freq = inv_freq.contiguous()
        yield Table(inv_freq, scaling, dtype)
        if dtype is not ir.DataType.FLOAT:
            yield Table(inv_freq, scaling, ir.DataType.FLOAT)
            yield Table(inv_freq, scaling, dtype, widened=True)


def _upstream(values: frozenset[ir.Value], op_type: str) -> ir.Node | None:
    """The nearest node of a type that these values are made from."""
    waiting, seen = list(values), set()
    while waiting:
        node = waiting.pop(0).producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == op_type:
            return node
        waiting += [value for value in node.inputs if value is not None]
    return None


def _cos_sin(model: ir.Model, positions: ir.Value, table: Table, made: dict) -> ir.Value:
    """The output of the table's node, made at the head of the graph and once only."""
    graph = model.graph
    key = (table.inv_freq.numpy().tobytes(), table.scaling, table.dtype)
    if key not in made:
        data = ir.tensor(table.inv_freq, name=f"rotary.{len(made)}.inv_freq")
        inv_freq = ir.Value(name=data.name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
        graph.register_initializer(inv_freq)
        shape = (dims(positions)[0], 2 * len(table.inv_freq))
        attributes = dict(attention_scaling=table.scaling, dtype=int(table.dtype))
        made[key] = new(graph[0], "RotaryCosSin", [positions, inv_freq], shape, table.dtype, INGOT, **attributes)
    if not table.widened:
        return made[key]
    if (*key, "widened") not in made:
        rounded = made[key]
        first = next(use.node for use in rounded.uses()) if rounded.uses() else graph[1]
        made[*key, "widened"] = new(
            first, "Cast", [rounded], dims(rounded), ir.DataType.FLOAT, to=int(ir.DataType.FLOAT)
        )
    return made[*key, "widened"]
