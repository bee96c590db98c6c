"""How passes read and edit a graph: constants, shapes, new nodes, replaced values, evaluation of a small region.

`onnx_ir` is the graph; these are the few gestures every pass needs. Weights (float initialisers) are never constants
here, so that no pass can pull one into memory. A new value always gets its shape and type, because the passes after it
decide by them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ...plugins.dtypes import to_torch
from ...plugins.onnx_ops import ONNX_OPS

Dim = int | str | None
INGOT = "ingot"


def constant_of(value: ir.Value | None) -> torch.Tensor | None:
    """The tensor of a Constant node, of an integer initialiser or of a scalar one; None for weights and activations."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is not None:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            return None
        return run_node(node, ())[0]
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None or (tensor.dtype.is_floating_point() and tensor.shape.rank() > 0):
        return None
    return to_torch(tensor)


def scalar_of(value: ir.Value | None) -> float | int | bool | None:
    """The number a constant of one element holds."""
    tensor = constant_of(value)
    return None if tensor is None or tensor.numel() != 1 else tensor.item()


def run_node(node: ir.Node, inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...] | None:
    """Computes a standard ONNX node in torch, None if `plugins.onnx_ops` cannot."""
    binder = ONNX_OPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if binder is None:
        return None
    run = binder({name: attribute.value for name, attribute in node.attributes.items()}, tuple(inputs))
    if run is None:
        return None
    result = run(*inputs)
    return result if isinstance(result, tuple) else (result,)


def evaluate(value: ir.Value, known: Mapping[ir.Value, torch.Tensor]) -> torch.Tensor:
    """Computes `value` from the known ones, constants, and small buffers (initialisers) on the way.

    Raises:
        LookupError: a graph input, or an op that cannot be computed, lies on the way.
    """
    results = dict(known)

    def visit(target: ir.Value) -> torch.Tensor:
        if target in results:
            return results[target]
        node = target.producer()
        if node is None:
            if target.const_value is None:
                raise LookupError(f"'{target.name}' has no value")
            results[target] = to_torch(target.const_value)
            return results[target]
        outputs = run_node(node, [None if source is None else visit(source) for source in node.inputs])
        if outputs is None:
            raise LookupError(f"{node.op_type} cannot be computed")
        results.update(zip(node.outputs, outputs, strict=False))
        return results[target]

    return visit(value)


def dims(value: ir.Value) -> tuple[Dim, ...]:
    """The shape: numbers, names, None for unknown. Every value has one after verification."""
    assert value.shape is not None, f"'{value.name}' has no shape"
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """True where both are known to have the same shape; two unknown sizes are not the same."""
    return dims(a) == dims(b) and None not in dims(a)


def is_op(value: ir.Value | None, *op_types: str, domain: str = "") -> bool:
    """Whether the value is made by one of these ops."""
    node = None if value is None else value.producer()
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "") == domain


def producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, f"'{value.name}' is made by no node"
    return node


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def new(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    shape: Iterable[Dim] | ir.Shape,
    dtype: ir.DataType | None,
    domain: str = "",
    /,
    **attributes: Any,
) -> ir.Value:
    """Inserts a node with one output in front of `before`; returns the output."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain)
    output = node.outputs[0]
    output.shape = ir.Shape(shape)
    output.dtype = dtype
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def constant(before: ir.Node, tensor: torch.Tensor) -> ir.Value:
    """Inserts a Constant in front of `before`."""
    data = ir.tensor(tensor.contiguous())
    return new(before, "Constant", [], data.shape, data.dtype, value=data)


def integers(before: ir.Node, numbers: Sequence[int]) -> ir.Value:
    """Inserts a 1-D int64 Constant in front of `before`."""
    return constant(before, torch.tensor(list(numbers), dtype=torch.int64))


def reshape(before: ir.Node, x: ir.Value, shape: Sequence[Dim]) -> ir.Value:
    """Inserts a Reshape to a shape with at most one size that is not a number."""
    target = [d if isinstance(d, int) else -1 for d in shape]
    assert target.count(-1) <= 1, f"{shape} has more than one open size"
    return new(before, "Reshape", [x, integers(before, target)], shape, x.dtype)


def replace(old: ir.Value, replacement: ir.Value) -> None:
    """Lets every reader of `old`, the graph's outputs included, read `replacement`."""
    if old.is_graph_output():
        graph = producer(old).graph
        assert graph is not None
        name, old.name = old.name, None
        if replacement.name in {v.name for v in graph.outputs} or replacement.producer() is None:
            replacement = new(graph[-1], "Identity", [replacement], dims(replacement), replacement.dtype)
        replacement.name = name
    ir.convenience.replace_all_uses_with(old, replacement, replace_graph_outputs=True)


def nodes(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """The nodes of these types (all without any) in graph order; a list, so that a pass may edit the graph."""
    return [node for node in model.graph if not op_types or node.op_type in op_types]
