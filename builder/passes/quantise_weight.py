"""Weights in few bits in the graph: `NAME.quantised`, `NAME.scale`, `NAME.zero`, and DequantizeLinear in front of what
read the weight. The numbers are made when they are written or asked for.

Of a table, rows are gathered first, numbers and scales, and only those are taken back. A weight of Experts has a scale
for each row of each expert, or for groups of its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import onnx_ir as ir
import torch

from ...calibration.formats import Format, Quantised, round_to_nearest
from ...engines.dtypes import DTYPES
from .graph import attribute, dims, size

ELEMENTS = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8_e4m3": ir.DataType.FLOAT8E4M3FN}


class Numbers(Protocol):
    """What is written of a weight: a `Quantised`, or what gives its tensors one by one."""

    @property
    def values(self) -> torch.Tensor: ...
    @property
    def scale(self) -> torch.Tensor: ...
    @property
    def zero(self) -> torch.Tensor | None: ...


Make = Callable[[], Numbers]


def quantise_linear(model: ir.Model, weight: ir.Value, form: Format, make: Make) -> None:
    """Stores a weight [N, K], in place. `make()` gives it in the format, [N, K], when it is asked for."""
    inputs = _stored(model, weight, form, make)
    for user, index in [(use.node, use.idx) for use in weight.uses()]:
        user.replace_input_with(index, _dequantised(model, weight, inputs, _axis(weight, form), user))
    del model.graph.initializers[weight.name or ""]


def quantise_table(model: ir.Model, table: ir.Value, form: Format, make: Make) -> None:
    """Stores a table [V, K] with a scale for each row, in place. Linears that read it too read what is stored."""
    inputs = _stored(model, table, form, make)
    for user, index in [(use.node, use.idx) for use in table.uses()]:
        if user.op_type != "Gather":
            user.replace_input_with(index, _dequantised(model, table, inputs, {"axis": 0}, user))
            continue
        y, rows = user.outputs[0], []
        for part in inputs:
            gather = ir.node("Gather", [part, user.inputs[1]], {"axis": 0}, name=f"{user.name}.{_kind(part)}")
            _describe(gather.outputs[0], f"{y.name}.{_kind(part)}", (*dims(y)[:1], *dims(part)[1:]), part.dtype)
            model.graph.insert_before(user, gather)
            rows.append(gather.outputs[0])
        result = _dequantised(model, table, rows, {"axis": 0}, user, dims(y))
        ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
        model.graph.remove(user, safe=True)
    del model.graph.initializers[table.name or ""]


def quantise_experts(model: ir.Model, weight: ir.Value, form: Format, load: Callable[[], torch.Tensor]) -> None:
    """Stores a weight of Experts, [E, N, K] or, where the op is `transposed`, [E, K, N], rounded to the nearest."""
    (reader,) = (use.node for use in weight.uses())
    transposed = bool(attribute(reader, "transposed", 0))
    stored = num, *_ = tuple(size(weight, axis) for axis in range(3))
    rows, columns = reversed(stored[1:]) if transposed else stored[1:]
    groups = -(-columns // form.group) if form.group else 1
    shape = (num, groups, rows) if transposed else (num, rows, groups)

    def make(part: Callable[[Quantised], torch.Tensor]) -> torch.Tensor:
        turned = (lambda x: x.T.contiguous()) if transposed else (lambda x: x)
        return torch.stack([turned(part(round_to_nearest(turned(each), form))) for each in load()])

    parts = {
        "quantised": (ELEMENTS[form.dtype], stored, lambda: make(lambda made: made.values)),
        "scale": (ir.DataType.FLOAT, shape, lambda: make(lambda made: _by_row(made.scale, form, rows))),
        "zero": (ELEMENTS[form.dtype], shape, lambda: make(lambda made: _zero(made, form, rows))),
    }
    inputs = [_initialiser(model, f"{weight.name}.{kind}", *part) for kind, part in parts.items()
              if kind != "zero" or not form.symmetric]  # fmt: skip
    axis = {"axis": 1 if transposed else 2, "block_size": form.group or columns}
    reader.replace_input_with(list(reader.inputs).index(weight), _dequantised(model, weight, inputs, axis, reader))
    del model.graph.initializers[weight.name or ""]


def _stored(model: ir.Model, weight: ir.Value, form: Format, make: Make) -> list[ir.Value]:
    rows, columns = size(weight, 0), size(weight, 1)
    shape = (rows, -(-columns // form.group)) if form.group else (rows,)
    parts = {
        "quantised": (ELEMENTS[form.dtype], (rows, columns), lambda: make().values),
        "scale": (ir.DataType.FLOAT, shape, lambda: _by_row(make().scale, form, rows)),
        "zero": (ELEMENTS[form.dtype], shape, lambda: _zero(make(), form, rows)),
    }
    return [_initialiser(model, f"{weight.name}.{kind}", *part) for kind, part in parts.items()
            if kind != "zero" or not form.symmetric]  # fmt: skip


def _by_row(numbers: torch.Tensor, form: Format, rows: int) -> torch.Tensor:
    """Scales of blocks as one for each row: [N, G]."""
    return numbers.repeat_interleave(form.rows or rows, 0)[:rows]


def _zero(made: Numbers, form: Format, rows: int) -> torch.Tensor:
    assert made.zero is not None
    return _by_row(made.zero, form, rows)


def _axis(weight: ir.Value, form: Format) -> dict[str, int]:
    return {"axis": 1, "block_size": form.group} if form.group else {"axis": 0}


def _dequantised(
    model: ir.Model, weight: ir.Value, inputs: list[ir.Value], axis: dict[str, int], reader: ir.Node, shape: tuple = ()
) -> ir.Value:
    """The node in front of `reader`; named after the reader too where the weight has several."""
    assert weight.dtype is not None
    name = weight.name if len(weight.uses()) == 1 and not shape else f"{weight.name}.{reader.name}"
    node = ir.node("DequantizeLinear", inputs, axis | {"output_dtype": int(weight.dtype)}, name=f"{name}.dequantise")
    _describe(node.outputs[0], f"{name}.dequantised", shape or dims(weight), weight.dtype)
    model.graph.insert_before(reader, node)
    return node.outputs[0]


def _initialiser(
    model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...], load: Callable[[], torch.Tensor]
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    evaluate = partial(_tensor, load, dtype, shape, name)
    value.const_value = ir.LazyTensor(evaluate, dtype, ir.Shape(shape), name=name, cache=False)
    model.graph.register_initializer(value)
    return value


def _tensor(load: Callable[[], torch.Tensor], dtype: ir.DataType, shape: tuple[int, ...], name: str) -> ir.Tensor:
    tensor = load().reshape(shape).contiguous()
    if dtype == ir.DataType.FLOAT8E4M3FN:
        array = tensor.view(torch.uint8).numpy().view(DTYPES["float8_e4m3fn"].numpy)
    else:
        array = tensor.numpy().astype(dtype.numpy())
    return ir.Tensor(array, dtype=dtype, name=name)


def _kind(part: ir.Value) -> str:
    return (part.name or "").rpartition(".")[2]


def _describe(value: ir.Value, name: str, shape: tuple, dtype: ir.DataType | None) -> None:
    assert dtype is not None
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
