"""Folds what does not depend on the tokens, and drops nodes that do nothing. Weights are left alone.

Shapes need no folding of their own: the exporter declares them, so a Reshape whose target is computed from the number
of tokens becomes one with a constant target, and the arithmetic before it is dead. Squeeze, Unsqueeze, unit Transposes
and single picks all become Reshape too, the one form that the passes after this one look through.
"""

import onnx_ir as ir
import torch

from .graph import (
    LARGEST_CONSTANT,
    attribute,
    constant,
    constant_of,
    dims,
    integers,
    made_by,
    new,
    nodes,
    operand,
    replace,
    reshape,
    run_node,
    same_shape,
    scalar_of,
)

RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def fold_constants(model: ir.Model) -> None:
    """A standard op on constants alone becomes a Constant."""
    for node in nodes(model):
        if node.op_type == "Constant" or not node.inputs or len(node.outputs) != 1:
            continue
        inputs = [constant_of(value) for value in node.inputs]
        if any(tensor is None and value is not None for tensor, value in zip(inputs, node.inputs, strict=True)):
            continue
        result = run_node(node, inputs)
        if result is not None and result[0].numel() <= LARGEST_CONSTANT:
            replace(node.outputs[0], constant(node, result[0]))


def static_shapes(model: ir.Model) -> None:
    """Every op that only renames axes becomes `Reshape(x, constant)`, of the first value of such a chain."""
    for node in nodes(model):
        x, y = (node.inputs or [None])[0], node.outputs[0]
        if x is None or x.shape is None or y.shape is None:
            continue
        if node.op_type == "Expand" and constant_of(node.inputs[1]) is None:
            _expand_statically(node)
        if not _renames_axes(node) or sum(not isinstance(d, int) for d in dims(y)) > 1:
            continue
        if node.op_type == "Reshape" and constant_of(node.inputs[1]) is not None and not made_by(x, "Reshape"):
            continue
        replace(y, reshape(node, below_reshapes(x), dims(y)))


def below_reshapes(x: ir.Value) -> ir.Value:
    """The value that a chain of Reshapes starts from."""
    while (view := made_by(x, "Reshape")) is not None and operand(view).shape is not None:
        x = operand(view)
    return x


def _expand_statically(node: ir.Node) -> None:
    """An axis that x has already is 1 in the target of an Expand: broadcasting keeps it."""
    shape, old = dims(node.outputs[0]), dims(operand(node))
    old = (1,) * (len(shape) - len(old)) + old
    target = [1 if now == before else now for now, before in zip(shape, old, strict=True)]
    numbers = [d for d in target if isinstance(d, int)]
    if None not in old and len(numbers) == len(target):
        node.replace_input_with(1, integers(node, numbers))


def _renames_axes(node: ir.Node) -> bool:
    """Whether the node gives the same elements in the same order under another shape."""
    if node.op_type in RESHAPES:
        return True
    shape = dims(operand(node))
    if node.op_type == "Transpose":
        perm = attribute(node, "perm", ())
        moved = [axis for axis in perm if shape[axis] != 1]
        return len(perm) == len(shape) and moved == sorted(moved)
    if node.op_type == "Gather":  # x[0] of an axis of one
        return shape[attribute(node, "axis", 0)] == 1 and scalar_of(node.inputs[1]) in (0, -1)
    return False


def gather_rows(model: ir.Model) -> None:
    """GatherND with one index per row -> Gather."""
    for node in nodes(model, "GatherND"):
        data, index, y = operand(node), operand(node, 1), node.outputs[0]
        if attribute(node, "batch_dims", 0) or index.shape is None or dims(index)[-1] != 1 or y.shape is None:
            continue
        index = reshape(node, index, dims(index)[:-1])
        replace(y, new(node, "Gather", [data, index], dims(y), data.dtype, axis=0))


def cast_by_type(model: ir.Model) -> None:
    """`CastLike(x, y)` -> Cast to the type of y, which is known."""
    for node in nodes(model, "CastLike"):
        like, y = operand(node, 1), node.outputs[0]
        if like.dtype is not None and y.shape is not None:
            replace(y, new(node, "Cast", [operand(node)], dims(y), like.dtype, to=int(like.dtype)))


def drop_no_ops(model: ir.Model) -> None:
    """Identity, a cast to the same type, x * 1, x / 1, a one-input Concat, an Expand or Slice that keeps the shape."""
    for node in nodes(model):
        y = node.outputs[0]
        if y.is_graph_output() or y.shape is None:
            continue
        for x in node.inputs[: 2 if node.op_type == "Mul" else 1]:
            if x is None or x.shape is None or not same_shape(x, y) or x.dtype != y.dtype:
                continue
            if _keeps(node, x):
                replace(y, x)
                break


def _keeps(node: ir.Node, x: ir.Value) -> bool:
    """Whether the node gives its input x as it is, shape and type being the same."""
    match node.op_type:
        case "Identity" | "Cast" | "Reshape" | "Expand":
            return True
        case "Concat" | "Max" | "Min" | "Sum":
            return len(node.inputs) == 1
        case "Mul" | "Div":
            other = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
            return scalar_of(other) == 1
        case "Transpose":
            return list(attribute(node, "perm", ())) == list(range(len(dims(x))))
        case "Slice":  # the same shape and no negative step: nothing was cut
            steps = constant_of(node.inputs[4]) if len(node.inputs) > 4 else torch.ones(1)
            return steps is not None and bool((steps == 1).all())
    return False


def order_operands(model: ir.Model) -> None:
    """Activation first, weight next, constant last in every sum and product, so that patterns need one order."""
    for node in nodes(model, "Add", "Mul"):
        a, b = operand(node), operand(node, 1)
        if _rank(a) > _rank(b):
            node.replace_input_with(0, b)
            node.replace_input_with(1, a)


def _rank(value: ir.Value | None, depth: int = 3) -> int:
    """2 for constants, 1 for weights and what is made of them in a step or two (a cast, 1 + w), 0 for activations."""
    if value is None or constant_of(value) is not None:
        return 2
    if value.is_initializer():
        return 1
    node = made_by(value, "Cast", "Add")
    return 0 if node is None or not depth else min(_rank(source, depth - 1) for source in node.inputs)
