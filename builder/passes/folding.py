"""Folds what does not depend on the tokens, and drops nodes that do nothing. Weights are left alone.

Shapes need no folding of their own: the exporter declares them, so a Reshape whose target is computed from the number
of tokens becomes one with a constant target, and the arithmetic before it is dead. Squeeze, Unsqueeze, unit Transposes
and single picks all become Reshape too, the one form that the passes after this one look through.
"""

import onnx_ir as ir
import torch

from .graph import (
    attribute,
    constant,
    constant_of,
    dims,
    integers,
    is_op,
    new,
    nodes,
    producer,
    replace,
    reshape,
    run_node,
    same_shape,
    scalar_of,
)

LARGEST_FOLDED = 65536  # elements; what is larger is computed every step rather than stored
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def lower_sequences(model: ir.Model) -> None:
    """`SequenceAt(SplitToSequence(x, size), i)` (torch's chunk and split) -> Slice. No target has sequences."""
    for node in nodes(model, "SequenceAt"):
        index = scalar_of(node.inputs[1])
        if not is_op(node.inputs[0], "SplitToSequence") or not isinstance(index, int):
            continue
        split = producer(node.inputs[0])  # type: ignore[arg-type]
        x, sizes = split.inputs[0], constant_of(split.inputs[1]) if len(split.inputs) > 1 else None
        axis, shape = attribute(split, "axis", 0), node.outputs[0].shape
        if x is None or x.shape is None or sizes is None or index < 0 or not attribute(split, "keepdims", 1):
            continue
        total = dims(x)[axis]
        if sizes.dim() == 0:
            start, size = index * int(sizes), int(sizes)
        else:
            start, size = int(sizes[:index].sum()), int(sizes[index])
        if not isinstance(total, int) or shape is None:
            continue
        bounds = [integers(node, [n]) for n in (start, min(start + size, total), axis % len(dims(x)))]
        replace(node.outputs[0], new(node, "Slice", [x, *bounds], shape, x.dtype))


def fold_constants(model: ir.Model) -> None:
    """A standard op on constants alone becomes a Constant."""
    for node in nodes(model):
        if node.op_type == "Constant" or not node.inputs or len(node.outputs) != 1:
            continue
        inputs = [None if value is None else constant_of(value) for value in node.inputs]
        if any(tensor is None and value is not None for tensor, value in zip(inputs, node.inputs, strict=True)):
            continue
        result = run_node(node, inputs)
        if result is not None and result[0].numel() <= LARGEST_FOLDED:
            replace(node.outputs[0], constant(node, result[0]))


def static_shapes(model: ir.Model) -> None:
    """Every op that only renames axes becomes `Reshape(x, constant)`, of the first value of such a chain."""
    for node in nodes(model):
        x, y = (node.inputs or [None])[0], node.outputs[0]
        if x is None or x.shape is None or y.shape is None:
            continue
        if node.op_type == "Expand" and constant_of(node.inputs[1]) is None:
            _expand_statically(node)
        if not _renames_axes(node):
            continue
        if sum(not isinstance(d, int) for d in dims(y)) > 1:
            continue
        if node.op_type == "Reshape" and constant_of(node.inputs[1]) is not None and not is_op(x, "Reshape"):
            continue
        while is_op(x, "Reshape") and x.shape is not None:
            x = producer(x).inputs[0]
            assert x is not None
        replace(y, reshape(node, x, dims(y)))


def _expand_statically(node: ir.Node) -> None:
    """An axis that x has already is 1 in the target of an Expand: broadcasting keeps it."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    shape = dims(y)
    old = (1,) * (len(shape) - len(dims(x))) + dims(x)
    target = [1 if now == before else now for now, before in zip(shape, old, strict=True)]
    if None not in old and all(isinstance(d, int) for d in target):
        node.replace_input_with(1, integers(node, target))  # type: ignore[arg-type]


def _renames_axes(node: ir.Node) -> bool:
    """Whether the node gives the same elements in the same order under another shape."""
    if node.op_type in RESHAPES:
        return True
    x = node.inputs[0]
    if node.op_type == "Transpose":
        moved = [axis for axis in attribute(node, "perm", ()) if dims(x)[axis] != 1]  # type: ignore[arg-type]
        return bool(attribute(node, "perm")) and moved == sorted(moved)
    if node.op_type == "Gather":  # x[0] of an axis of one
        return dims(x)[attribute(node, "axis", 0)] == 1 and _is_first(node.inputs[1])  # type: ignore[arg-type]
    return False


def _is_first(index: ir.Value | None) -> bool:
    tensor = constant_of(index)
    return tensor is not None and tensor.numel() == 1 and int(tensor) in (0, -1)


def cast_by_type(model: ir.Model) -> None:
    """`CastLike(x, y)` -> Cast to the type of y, which is known."""
    for node in nodes(model, "CastLike"):
        x, like = node.inputs
        y = node.outputs[0]
        if like is not None and like.dtype is not None and y.shape is not None:
            replace(y, new(node, "Cast", [x], y.shape, like.dtype, to=int(like.dtype)))


def drop_no_ops(model: ir.Model) -> None:
    """Identity, a cast to the same type, x * 1, a one-input Concat, a whole Slice, a repeated unit Transpose."""
    for node in nodes(model):
        for x in node.inputs[: 2 if node.op_type in ("Mul", "Add") else 1]:
            y = node.outputs[0]
            if x is None or y.is_graph_output() or x.shape is None or y.shape is None:
                continue
            if same_shape(x, y) and x.dtype == y.dtype and _keeps(node, x):
                replace(y, x)
                break


def _keeps(node: ir.Node, x: ir.Value) -> bool:
    match node.op_type:
        case "Identity" | "Cast" | "Reshape" | "Expand":
            return True
        case "Concat" | "Max" | "Min" | "Sum":
            return len(node.inputs) == 1
        case "Mul" | "Div":
            other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
            return scalar_of(other) == 1
        case "Transpose":
            return list(attribute(node, "perm", ())) == sorted(attribute(node, "perm", ()))
        case "Slice":  # the same shape and no negative step: nothing was cut
            steps = constant_of(node.inputs[4]) if len(node.inputs) > 4 else torch.ones(1)
            return steps is not None and bool((steps == 1).all()) and None not in dims(x)
    return False


def gather_rows(model: ir.Model) -> None:
    """GatherND with one index per row -> Gather."""
    for node in nodes(model, "GatherND"):
        data, index = node.inputs
        assert data is not None and index is not None
        y = node.outputs[0]
        if attribute(node, "batch_dims", 0) or index.shape is None or dims(index)[-1] != 1 or y.shape is None:
            continue
        index = reshape(node, index, dims(index)[:-1])
        replace(y, new(node, "Gather", [data, index], y.shape, data.dtype, axis=0))


def drop_index_casts(model: ir.Model) -> None:
    """An index of a Gather or of Experts needs no cast from one integer type to another."""
    for node in nodes(model, "Gather", "Experts"):
        index = node.inputs[1]
        if is_op(index, "Cast"):
            source = producer(index).inputs[0]  # type: ignore[arg-type]
            if source is not None and source.dtype in (ir.DataType.INT32, ir.DataType.INT64):
                node.replace_input_with(1, source)


def order_operands(model: ir.Model) -> None:
    """Activation first, weight next, constant last in every sum and product, so that patterns need one order."""
    for node in nodes(model, "Add", "Mul"):
        a, b = node.inputs
        if a is not None and b is not None and _rank(a) > _rank(b):
            node.replace_input_with(0, b)
            node.replace_input_with(1, a)


def _rank(value: ir.Value | None, depth: int = 3) -> int:
    """2 for constants, 1 for weights and what is made of them in a step or two (a cast, 1 + w), 0 for activations."""
    if value is None or constant_of(value) is not None:
        return 2
    if value.is_initializer():
        return 1
    node = value.producer()
    if node is None or node.op_type not in ("Cast", "Add") or not depth:
        return 0
    return min(_rank(source, depth - 1) for source in node.inputs)
