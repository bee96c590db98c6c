"""Types and shapes of a plugin's outputs, from the ONNX schema of its op: nothing is said twice.

TensorRT asks with expressions for sizes, the schema's inference answers with numbers and names: an open size is called
by its place (`0.1`: input 0, axis 1), and a name in the answer leads back to the expression.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TypeProto, helper, shape_inference

from ...engines.tensorrt import PluginNode
from ..ops import OPS, register_schemas

Sizes = Sequence[int | None]  # None: open
Size = int | tuple[int, int]  # a number, or the size at (input, axis)


def output_types(node: PluginNode) -> list[int]:
    """ONNX element types of the op's own outputs, and of the pools behind them."""
    found = _infer(node, [helper.make_tensor_type_proto(each, None) for each in node.types])
    return [each.tensor_type.elem_type for each in found] + [node.types[i] for i in node.pools]


def output_shapes(node: PluginNode, shapes: Sequence[Sizes]) -> list[list[Size]]:
    """Shapes of the op's own outputs, and of the pools behind them.

    Raises ValueError: the schema does not say what one of them is.
    """
    inputs = []
    for i, (type_, shape) in enumerate(zip(node.types, shapes, strict=True)):
        dims = [f"{i}.{axis}" if size is None else size for axis, size in enumerate(shape)]
        inputs.append(helper.make_tensor_type_proto(type_, dims))
    own = [[_size(dim, node) for dim in each.tensor_type.shape.dim] for each in _infer(node, inputs)]
    pools = [[(i, axis) if size is None else size for axis, size in enumerate(shapes[i])] for i in node.pools]
    return [*own, *pools]


def _infer(node: PluginNode, types: Sequence[TypeProto]) -> list[TypeProto]:
    register_schemas()
    schema = OPS[node.op].schema
    names = [""] * (max(node.inputs) + 1)
    for index in node.inputs:
        names[index] = f"i{index}"
    outputs = [f"o{i}" for i in range(node.num_outputs)]
    proto = helper.make_node(node.op, names, outputs, domain=schema.domain, **node.attributes)
    given = {f"i{index}": type_ for index, type_ in zip(node.inputs, types, strict=True)}
    imports = [helper.make_opsetid(schema.domain, schema.since_version), helper.make_opsetid("", 23)]
    found = shape_inference.infer_node_outputs(schema, proto, given, opset_imports=imports)
    return [found[name] for name in outputs]


def _size(dim: onnx.TensorShapeProto.Dimension, node: PluginNode) -> Size:
    if dim.HasField("dim_value"):
        return dim.dim_value
    if not dim.HasField("dim_param"):
        raise ValueError(f"the schema of {node.op} leaves a size open")
    index, _, axis = dim.dim_param.partition(".")
    return int(index), int(axis)
