"""Takes activations to 2-D [T, width]: the batch axis of one that transformers needs, and views by heads, disappear.

A view (Reshape) moves down past every op that does not mind it, until it meets the view that undoes it. What moves:
element-wise ops and ops on the last axis past a view that only adds leading axes of one; RMSNorm, whose chunks a view
by heads does not cut, past any view and any Transpose that keeps the last axis; a Gather of rows past a view that
keeps the first axis.
"""

from collections.abc import Sequence

import onnx_ir as ir

from .graph import INGOT, attribute, constant_of, dims, integers, is_op, new, nodes, producer, replace, reshape

ELEMENTWISE = frozenset(
    "Abs Add Cast Clip Div Erf Exp Gelu Max Min Mul Neg Pow Reciprocal Relu Sigmoid Softplus Sqrt Sub Swish Tanh "
    "Where".split()
)
LAST_AXIS = frozenset("LayerNormalization Linear LogSoftmax RMSNorm Softmax".split())  # with axis -1 where it is given


def drop_batch_axis(model: ir.Model) -> None:
    """Ops on [1, T, ...] become the same ops on [T, ...]."""
    for node in nodes(model, *ELEMENTWISE, *LAST_AXIS, "Gather", "Reshape", "Slice"):
        match node.op_type:
            case "Reshape":
                _join(node)
            case "Gather":
                _gather(node)
            case "Slice":
                _slice(node)
            case "RMSNorm" if len(node.outputs) == 1:
                _norm(node)
            case op_type if len(node.outputs) == 1 and (op_type in ELEMENTWISE or _on_last_axis(node)):
                _strip(node)


def _join(node: ir.Node) -> None:
    """A view of a view is a view of what lies below; a view to the shape it had is nothing."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    if constant_of(node.inputs[1]) is None or sum(not isinstance(d, int) for d in dims(y)) > 1:
        return
    while is_op(x, "Reshape"):
        x = producer(x).inputs[0]
        assert x is not None
    if dims(x) == dims(y):
        replace(y, x)
    elif x is not node.inputs[0]:
        replace(y, reshape(node, x, dims(y)))


def _strip(node: ir.Node) -> None:
    """f([1, T, ..]) -> view(f([T, ..])), where every input is such a view or broadcasts to it from the right."""
    y = node.outputs[0]
    inputs = [None if value is None else _without_ones(value) for value in node.inputs]
    moved = [(a, b) for a, b in zip(node.inputs, inputs, strict=True) if a is not b]
    if not moved:
        return
    ones = {len(dims(a)) - len(dims(b)) for a, b in moved}  # type: ignore[arg-type]
    rank = len(dims(y))
    if len(ones) != 1 or any(len(dims(a)) != rank for a, _ in moved):  # type: ignore[arg-type]
        return
    shape = dims(y)[ones.pop() :]
    if any(b is not None and len(dims(b)) > len(shape) for b in inputs):
        return
    made = new(node, node.op_type, inputs, shape, y.dtype, node.domain, **_attributes(node))
    replace(y, reshape(node, made, dims(y)))


def _without_ones(value: ir.Value) -> ir.Value:
    """What a view that only adds leading axes of one shows; the value itself where it is none."""
    if not is_op(value, "Reshape"):
        return value
    base = producer(value).inputs[0]
    assert base is not None
    shape, inner = dims(value), dims(base)
    count = len(shape) - len(inner)
    return base if count > 0 and inner and shape == (1,) * count + inner and None not in inner else value


def _on_last_axis(node: ir.Node) -> bool:
    x = node.inputs[0]
    assert x is not None
    axis = attribute(node, "axis", -1)
    if axis == len(dims(x)) - 1 and "axis" in node.attributes:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        axis = -1
    return axis == -1


def _norm(node: ir.Node) -> None:
    """Chunks of the last axis are normalised one by one: any view and Transpose that keeps them whole moves below."""
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    width = dims(weight)[0]
    y = node.outputs[0]
    if is_op(x, "Transpose"):
        perm = list(attribute(producer(x), "perm", ()))
        inner = producer(x).inputs[0]
        assert inner is not None
        if perm and perm[-1] == len(perm) - 1:
            made = new(node, "RMSNorm", [inner, weight], dims(inner), y.dtype, INGOT, **_attributes(node))
            replace(y, new(node, "Transpose", [made], dims(y), y.dtype, perm=perm))
            _norm(producer(made))
    elif is_op(x, "Reshape"):
        inner = producer(x).inputs[0]
        assert inner is not None
        columns = dims(inner)[-1]
        if isinstance(columns, int) and isinstance(width, int) and columns % width == 0 and dims(x)[-1] == width:
            made = new(node, "RMSNorm", [inner, weight], dims(inner), y.dtype, INGOT, **_attributes(node))
            replace(y, reshape(node, made, dims(y)))


def _slice(node: ir.Node) -> None:
    """Columns of a view that only adds leading axes of one."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    inner, axes = _without_ones(x), constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    if inner is not x and axes is not None and axes.tolist() in ([len(dims(x)) - 1], [-1]):
        shape = (*dims(inner)[:-1], dims(y)[-1])
        bounds = [*node.inputs[1:3], integers(node, [-1]), *node.inputs[4:]]
        replace(y, reshape(node, new(node, "Slice", [inner, *bounds], shape, y.dtype), dims(y)))


def _gather(node: ir.Node) -> None:
    """Rows by index: of a table by a [1, T] view of indices, or of a view that leaves the first axis alone."""
    data, index = node.inputs
    y = node.outputs[0]
    assert data is not None and index is not None
    if attribute(node, "axis", 0) != 0:
        return
    flat = _without_ones(index)
    if flat is not index:
        made = new(node, "Gather", [data, flat], (*dims(flat), *dims(data)[1:]), y.dtype, axis=0)
        replace(y, reshape(node, made, dims(y)))
    elif is_op(data, "Reshape") and len(dims(index)) == 1:
        inner = producer(data).inputs[0]
        assert inner is not None
        if dims(inner)[0] == dims(data)[0] and len(dims(inner)) == 2 and _numbers(dims(data)[1:]):
            made = new(node, "Gather", [inner, index], (*dims(index), dims(inner)[1]), y.dtype, axis=0)
            replace(y, reshape(node, made, dims(y)))


def _numbers(shape: Sequence[object]) -> bool:
    return all(isinstance(d, int) for d in shape)


def _attributes(node: ir.Node) -> dict[str, object]:
    return {name: found.value for name, found in node.attributes.items()}
