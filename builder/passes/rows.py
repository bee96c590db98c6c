"""Takes activations to 2-D [T, width]: the batch axis of one that transformers needs, and views by heads, disappear.

A view (Reshape) moves down past every op that does not mind it, until it meets the view that undoes it. What moves:
element-wise ops and ops on the last axis past a view that only adds leading axes of one; RMSNorm, whose chunks a view
by heads does not cut, past any view and any Transpose that keeps the last axis; a Gather of rows past a view that
keeps the first axis.
"""

import onnx_ir as ir

from .folding import below_reshapes
from .graph import (
    INGOT,
    attribute,
    attributes,
    constant_of,
    dims,
    integers,
    made_by,
    new,
    nodes,
    operand,
    replace,
    reshape,
)

ELEMENTWISE = frozenset(
    "Abs Add Cast Clip Div Erf Exp Gelu Max Min Mul Neg Pow Reciprocal Relu Sigmoid Softplus Sqrt Sub Swish Tanh "
    "Where".split()
)
LAST_AXIS = frozenset(
    "Concat LayerNormalization Linear LogSoftmax RMSNorm Softmax".split()
)  # with axis -1 where it is given


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
            case "RMSNorm":
                _norm(node)
            case op_type if len(node.outputs) == 1 and (op_type in ELEMENTWISE or _on_last_axis(node)):
                _strip(node)


def _join(node: ir.Node) -> None:
    """A view of a view is a view of what lies below; a view to the shape it had is nothing."""
    x, y = operand(node), node.outputs[0]
    if constant_of(node.inputs[1]) is None or sum(not isinstance(d, int) for d in dims(y)) > 1:
        return
    base = below_reshapes(x)
    if dims(base) == dims(y):
        replace(y, base)
    elif base is not x:
        replace(y, reshape(node, base, dims(y)))


def _strip(node: ir.Node) -> None:
    """f([1, T, ..]) -> view(f([T, ..])), where every input is such a view or broadcasts to it from the right."""
    y = node.outputs[0]
    inputs = [None if value is None else _without_ones(value) for value in node.inputs]
    moved = [(a, b) for a, b in zip(node.inputs, inputs, strict=True) if a is not None and b is not None and a is not b]
    counts = {len(dims(a)) - len(dims(b)) for a, b in moved}
    if len(counts) != 1 or any(len(dims(a)) != len(dims(y)) for a, _ in moved):
        return
    shape = dims(y)[counts.pop() :]
    if all(value is None or len(dims(value)) <= len(shape) for value in inputs):
        made = new(node, node.op_type, inputs, shape, y.dtype, node.domain, **attributes(node))
        replace(y, reshape(node, made, dims(y)))


def _without_ones(value: ir.Value) -> ir.Value:
    """What a view that only adds leading axes of one shows; the value itself where it is none."""
    view = made_by(value, "Reshape")
    if view is None:
        return value
    shape, inner = dims(value), dims(operand(view))
    count = len(shape) - len(inner)
    added = count > 0 and len(inner) > 0 and shape == (1,) * count + inner and None not in inner
    return operand(view) if added else value


def _on_last_axis(node: ir.Node) -> bool:
    """Whether the op works along the last axis, which is then written as -1."""
    if attribute(node, "axis", -1) == len(dims(operand(node))) - 1:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
    return attribute(node, "axis", -1) == -1


def _norm(node: ir.Node) -> None:
    """Chunks of the last axis are normalised one by one: any view and Transpose that keeps them whole moves below."""
    x, weight, y = operand(node), operand(node, 1), node.outputs[0]
    width = dims(weight)[0]
    transpose, view = made_by(x, "Transpose"), made_by(x, "Reshape")
    if transpose is not None:
        perm, inner = list(attribute(transpose, "perm", ())), operand(transpose)
        if perm[-1:] == [len(dims(x)) - 1]:
            made = new(node, "RMSNorm", [inner, weight], dims(inner), y.dtype, INGOT, **attributes(node))
            replace(y, new(node, "Transpose", [made], dims(y), y.dtype, perm=perm))
            _norm(made.producer())  # type: ignore[arg-type]
    elif view is not None:
        inner = operand(view)
        columns = dims(inner)[-1]
        if isinstance(columns, int) and isinstance(width, int) and columns % width == 0 and dims(x)[-1] == width:
            made = new(node, "RMSNorm", [inner, weight], dims(inner), y.dtype, INGOT, **attributes(node))
            replace(y, reshape(node, made, dims(y)))


def _slice(node: ir.Node) -> None:
    """Columns of a view that only adds leading axes of one."""
    x, y = operand(node), node.outputs[0]
    inner, axes = _without_ones(x), constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    if inner is not x and axes is not None and axes.tolist() in ([len(dims(x)) - 1], [-1]):
        bounds = [*node.inputs[1:3], integers(node, [-1]), *node.inputs[4:]]
        shape = (*dims(inner)[:-1], dims(y)[-1])
        replace(y, reshape(node, new(node, "Slice", [inner, *bounds], shape, y.dtype), dims(y)))


def _gather(node: ir.Node) -> None:
    """Rows by index: of a table by a [1, T] view of indices, or of a view that leaves the first axis alone."""
    data, index, y = operand(node), operand(node, 1), node.outputs[0]
    if attribute(node, "axis", 0) != 0:
        return
    flat, view = _without_ones(index), made_by(data, "Reshape")
    if flat is not index:
        made = new(node, "Gather", [data, flat], (*dims(flat), *dims(data)[1:]), y.dtype, axis=0)
        replace(y, reshape(node, made, dims(y)))
    elif view is not None and len(dims(index)) == 1:
        inner = operand(view)
        columns = (*dims(inner)[1:], *dims(data)[1:])
        if len(dims(inner)) == 2 and dims(inner)[0] == dims(data)[0] and all(isinstance(d, int) for d in columns):
            made = new(node, "Gather", [inner, index], (*dims(index), dims(inner)[1]), y.dtype, axis=0)
            replace(y, reshape(node, made, dims(y)))


def drop_index_casts(model: ir.Model) -> None:
    """An index of a Gather or of Experts needs no cast from one integer type to another."""
    for node in nodes(model, "Gather", "Experts"):
        cast = made_by(node.inputs[1], "Cast")
        if cast is not None and operand(cast).dtype in (ir.DataType.INT32, ir.DataType.INT64):
            node.replace_input_with(1, operand(cast))
