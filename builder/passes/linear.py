"""`Linear`: every matrix product with a stored weight, with its bias, in the checkpoint's [N, K] layout.

The exporter writes `MatMul(x, Transpose(W))` and `Gemm`; GPT-2 stores [K, N], which is transposed lazily. `Linear` acts
on the last axis, so it may stand on [1, T, K] until `rows.py` makes it 2-D.
"""

import onnx_ir as ir

from .graph import INGOT, attribute, dims, is_op, new, nodes, producer, replace
from .packed_weights import pack, transposed


def fuse_linear(model: ir.Model) -> None:
    """MatMul and Gemm with a 2-D weight -> Linear."""
    for node in nodes(model, "MatMul", "Gemm"):
        x, y = node.inputs[0], node.outputs[0]
        weight = _weight(node)
        if x is None or weight is None or y.shape is None or dims(x)[-1] != dims(weight)[1]:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not _is_bias(bias, weight):
            continue
        replace(y, new(node, "Linear", [x, weight, bias], y.shape, y.dtype, INGOT))


def fuse_bias(model: ir.Model) -> None:
    """`Linear(x, W) + b` -> `Linear(x, W, b)`."""
    for node in nodes(model, "Add"):
        y = node.outputs[0]
        for product, bias in (node.inputs, reversed(node.inputs)):
            if not is_op(product, "Linear", domain=INGOT) or bias is None or len(product.uses()) > 1:  # type: ignore[union-attr]
                continue
            linear = producer(product)  # type: ignore[arg-type]
            if len(linear.inputs) == 2 and _is_bias(bias, linear.inputs[1]):  # type: ignore[arg-type]
                replace(y, new(node, "Linear", [*linear.inputs, bias], dims(y), y.dtype, INGOT))
                break


def _weight(node: ir.Node) -> ir.Value | None:
    """The stored matrix the node multiplies by, as [N, K]; None if it is not one, or the node does more than that."""
    right = node.inputs[1]
    if right is None:
        return None
    turned = False
    if node.op_type == "Gemm":
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            return None
        turned = bool(attribute(node, "transB", 0))
    elif is_op(right, "Transpose") and list(attribute(producer(right), "perm", ())) == [1, 0]:
        turned, right = True, producer(right).inputs[0]
    if right is None or not right.is_initializer() or len(dims(right)) != 2:
        return None
    if turned:
        return right
    assert node.graph is not None
    return pack(node.graph, transposed(right), right)  # type: ignore[arg-type]


def _is_bias(value: ir.Value, weight: ir.Value) -> bool:
    return value.is_initializer() and value.dtype == weight.dtype and dims(value) == dims(weight)[:1]
