"""RoPE of every family -> `RotaryCosSin` once and one `Rope` per query and key.

Families write RoPE in a dozen ways: by halves or interleaved, on part of a head, with angles repeated before or after
the cosine, on heads cut out of a packed projection. A pattern for each would miss the next one. So the region before
the attention is computed on random numbers and compared with `Rope`: two different linear maps do not agree on them,
so agreement is proof, and in 16-bit types it must be bit for bit. A region that is no Rope is left as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from ...engines.step import POSITIONS
from ...plugins.rope import rope
from ...plugins.rotary_cos_sin import rotary_cos_sin
from .graph import INGOT, Dim, attribute, constant, dims, evaluate, new, nodes, scalar_of, size
from .regions import Region, agree, region_of, tables_of

FLOAT = ir.DataType.FLOAT
PROBE_POSITIONS = torch.tensor([0, 1, 2, 5, 11, 29, 57, 123], dtype=torch.int32)


@dataclass(frozen=True)
class Table:
    """What a `RotaryCosSin` node computes; a `widened` one is rounded to `dtype` and then cast to fp32 (Cohere 2)."""

    inv_freq: tuple[float, ...]  # r/2 fp32 numbers, radians per position
    scaling: float
    dtype: ir.DataType
    widened: bool = False

    def compute(self, positions: torch.Tensor) -> torch.Tensor:
        """[T, r]: cosines, then sines."""
        inv_freq = torch.tensor(self.inv_freq)
        table = rotary_cos_sin(positions, inv_freq, dtype=int(self.dtype), attention_scaling=self.scaling)
        return table.float() if self.widened else table


Rotation = dict[str, int]  # attributes of a Rope node, without the number of heads
Made = dict[Table, ir.Value]  # outputs of the RotaryCosSin (and Cast) nodes there are already


def fuse_rope(model: ir.Model) -> None:
    """The region before each query, key and value of an attention -> its columns of the projection, and a Rope."""
    positions = next((value for value in model.graph.inputs if value.name == POSITIONS), None)
    if positions is None:
        return
    tables = tables_of(model, positions)
    made: Made = {}
    for node in nodes(model, "PagedAttention"):
        kinds = ("num_heads", "head_dim"), ("num_kv_heads", "head_dim"), ("num_kv_heads", "v_head_dim")
        for index, (heads, head_dim) in enumerate(kinds):
            value = node.inputs[index]
            region = None if value is None else region_of(value, tables, positions)
            if region is not None and region.source is not value:
                _fuse(model, node, index, region, attribute(node, heads), attribute(node, head_dim), made)


def _fuse(
    model: ir.Model, node: ir.Node, index: int, region: Region, num_heads: int, head_dim: int, made: Made
) -> None:
    """Replaces input `index` of an attention node by columns of the region's source, rotated if they were."""
    taken = region.columns()
    if taken is None or len(taken[0]) != num_heads * head_dim or region.result.dtype != region.source.dtype:
        return
    columns, factor = taken
    if region.only_moves(columns, factor):
        if factor != 1.0 and index != 0:
            return
        x = _take(node, region.source, columns)
        if factor != 1.0:  # a scaled query: the factor goes where the scores are scaled, in fp32
            node.attributes["scale"] = ir.AttrFloat32("scale", attribute(node, "scale") * factor)
    else:
        found = next(_rotations(region, columns, head_dim), None)
        if found is None:
            return
        table, rotation = found
        x = _take(node, region.source, columns)
        inputs = [x, _cos_sin(model, region.positions, table, made)]
        x = new(node, "Rope", inputs, dims(x), x.dtype, INGOT, num_heads=num_heads, **rotation)
    node.replace_input_with(index, x)


def _take(before: ir.Node, x: ir.Value, columns: np.ndarray) -> ir.Value:
    """x[:, columns], x itself where that is all of it in order."""
    if np.array_equal(columns, np.arange(size(x, 1))):
        return x
    index = constant(before, torch.from_numpy(columns))
    return new(before, "Gather", [x, index], (dims(x)[0], len(columns)), x.dtype, axis=1)


def _rotations(region: Region, columns: np.ndarray, head_dim: int) -> Iterator[tuple[Table, Rotation]]:
    """The tables and Rope attributes with which `Rope(source[:, columns])` gives what the region gives."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(PROBE_POSITIONS), size(region.source, 1), generator=generator).to(region.dtype)
    expected = region.compute(x, PROBE_POSITIONS)
    if expected is None:
        return
    x = x[:, columns]
    for table in _candidate_tables(region):
        cos_sin = table.compute(PROBE_POSITIONS)
        width = cos_sin.shape[1]
        for offset in dict.fromkeys((0, head_dim - width)) if width <= head_dim else ():
            for interleaved in (0, 1):
                rotation = {"head_dim": head_dim, "interleaved": interleaved, "rotary_offset": offset}
                if agree(rope(x, cos_sin, num_heads=x.shape[1] // head_dim, **rotation), expected):
                    yield table, rotation


def _candidate_tables(region: Region) -> Iterator[Table]:
    """Tables the region may use: frequencies are its angles at position 1, the factor follows the cosine."""
    cosine = _upstream(region.tables, "Cos")
    if cosine is None or cosine.inputs[0] is None:
        return
    try:
        angles = evaluate(cosine.inputs[0], {region.positions: torch.ones(1, dtype=torch.int32)}).flatten()
    except (LookupError, RuntimeError):
        return
    users = [use.node for use in cosine.outputs[0].uses() if use.node.op_type == "Mul"]
    scaling = next((float(f) for node in users for v in node.inputs if (f := scalar_of(v)) is not None), 1.0)
    half = len(angles) // 2
    forms = []
    if len(angles) == 2 * half:
        forms += [angles[:half]] if torch.equal(angles[:half], angles[half:]) else []
        forms += [angles[0::2]] if torch.equal(angles[0::2], angles[1::2]) else []
    dtype = region.source.dtype
    assert dtype is not None
    for inv_freq in (*forms, angles):
        numbers = tuple(inv_freq.tolist())
        yield Table(numbers, scaling, dtype)
        if dtype is not FLOAT:
            yield Table(numbers, scaling, FLOAT)
            yield Table(numbers, scaling, dtype, widened=True)


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


def _cos_sin(model: ir.Model, positions: ir.Value, table: Table, made: Made) -> ir.Value:
    """The value of the table, made at the head of the graph and once only."""
    if table in made:
        return made[table]
    graph = model.graph
    if table.widened:
        rounded = _cos_sin(model, positions, Table(table.inv_freq, table.scaling, table.dtype), made)
        cast = ir.node("Cast", [rounded], {"to": int(FLOAT)})
        cast.outputs[0].shape, cast.outputs[0].type = rounded.shape, ir.TensorType(FLOAT)
        graph.insert_after(rounded.producer(), cast)  # type: ignore[arg-type]
        made[table] = cast.outputs[0]
    else:
        name = f"rotary.{sum(not other.widened for other in made)}.inv_freq"
        data = ir.tensor(torch.tensor(table.inv_freq), name=name)
        inv_freq = ir.Value(
            name=name, shape=ir.Shape([len(table.inv_freq)]), type=ir.TensorType(data.dtype), const_value=data
        )
        graph.register_initializer(inv_freq)
        shape: tuple[Dim, ...] = (dims(positions)[0], 2 * len(table.inv_freq))
        options = {"attention_scaling": table.scaling, "dtype": int(table.dtype)}
        made[table] = new(graph[0], "RotaryCosSin", [positions, inv_freq], shape, table.dtype, INGOT, **options)
    return made[table]
