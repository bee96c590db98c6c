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
LARGEST_CONSTANT = 65536  # elements; what is larger is a weight


def nodes(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """The nodes of these types (all without any) in graph order; a list, so that a pass may edit the graph."""
    return [node for node in model.graph if not op_types or node.op_type in op_types]


def operand(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that must be there."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} lacks input {index}"
    return value


def made_by(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that makes the value, if it is of one of these types."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in op_types or (node.domain or "").replace("ai.onnx", "") != domain:
        return None
    return node


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, `default` where it is not given."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def attributes(node: ir.Node) -> dict[str, Any]:
    """All attributes as plain values."""
    return {name: found.value for name, found in node.attributes.items()}


def dims(value: ir.Value) -> tuple[Dim, ...]:
    """The shape: numbers, names, None for unknown. Every value has one after verification."""
    assert value.shape is not None, f"'{value.name}' has no shape"
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def size(value: ir.Value, axis: int) -> int:
    """A dimension that must be a number."""
    found = dims(value)[axis]
    assert isinstance(found, int), f"axis {axis} of '{value.name}' is {found}"
    return found


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """True where both are known to have the same shape; two unknown sizes are not the same."""
    return dims(a) == dims(b) and None not in dims(a)


def constant_of(value: ir.Value | None) -> torch.Tensor | None:
    """The tensor of a Constant node, of an integer initialiser or of a scalar one; None for weights and activations."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is not None:
        made = run_node(node, ()) if made_by(value, "Constant") else None
        return None if made is None else made[0]
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None or tensor.size > LARGEST_CONSTANT:
        return None
    if tensor.dtype.is_floating_point() and tensor.shape.rank() > 0:
        return None
    return to_torch(tensor)


def scalar_of(value: ir.Value | None) -> float | int | bool | None:
    """The number a constant of one element holds."""
    tensor = constant_of(value)
    return None if tensor is None or tensor.numel() != 1 else tensor.item()


def run_node(node: ir.Node, inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...] | None:
    """Computes a standard ONNX node in torch, None if `plugins.onnx_ops` cannot."""
    binder = ONNX_OPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    run = binder(attributes(node), tuple(inputs)) if binder else None
    if run is None:
        return None
    result = run(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    tensors = tuple(output for output in outputs if isinstance(output, torch.Tensor))
    return tensors if len(tensors) == len(outputs) else None  # a sequence is no tensor


def evaluate(value: ir.Value, known: Mapping[ir.Value, torch.Tensor]) -> torch.Tensor:
    """Computes `value` from the known ones, constants, and small buffers (initialisers) on the way.

    Raises:
        LookupError: a graph input, a weight, or an op that cannot be computed lies on the way.
    """
    results = dict(known)

    def visit(target: ir.Value) -> torch.Tensor:
        if target in results:
            return results[target]
        node = target.producer()
        if node is None:
            if target.const_value is None or target.const_value.size > LARGEST_CONSTANT:
                raise LookupError(f"'{target.name}' has no value, or a large one")
            results[target] = to_torch(target.const_value)
            return results[target]
        outputs = run_node(node, [None if source is None else visit(source) for source in node.inputs])
        if outputs is None:
            raise LookupError(f"{node.op_type} cannot be computed")
        results.update(zip(node.outputs, outputs, strict=False))
        return results[target]

    return visit(value)


def new(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    shape: Iterable[Dim],
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
    output.shape, output.type = ir.Shape(shape), None if dtype is None else ir.TensorType(dtype)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def constant(before: ir.Node, tensor: torch.Tensor) -> ir.Value:
    """Inserts a Constant in front of `before`."""
    data = ir.tensor(tensor.contiguous())
    return new(before, "Constant", [], tuple(tensor.shape), data.dtype, value=data)


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
        if replacement.is_graph_output() or replacement.producer() is None:  # has a name that must stay
            node = old.producer()
            assert node is not None
            replacement = new(node, "Identity", [replacement], dims(replacement), replacement.dtype)
        name, old.name = old.name, None
        replacement.name = name
    ir.convenience.replace_all_uses_with(old, replacement, replace_graph_outputs=True)
