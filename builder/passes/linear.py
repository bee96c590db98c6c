"""`Linear`: every matrix product with a stored weight, with its bias, in the checkpoint's [N, K] layout.

The exporter writes `MatMul(x, Transpose(W))` and `Gemm`; GPT-2 stores [K, N], which is transposed lazily. `Linear` acts
on the last axis, so it may stand on [1, T, K] until `rows.py` makes it 2-D.
"""

import onnx_ir as ir

from .graph import INGOT, attribute, dims, made_by, new, nodes, operand, replace
from .packed_weights import pack, transposed


def fuse_linear(model: ir.Model) -> None:
    """MatMul and Gemm with a 2-D weight -> Linear."""
    for node in nodes(model, "MatMul", "Gemm"):
        x, y = operand(node), node.outputs[0]
        weight = _weight(model.graph, node)
        if weight is None or dims(x)[-1] != dims(weight)[1]:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None or _is_bias(bias, weight):
            replace(y, new(node, "Linear", [x, weight, bias], dims(y), y.dtype, INGOT))


def fuse_bias(model: ir.Model) -> None:
    """`Linear(x, W) + b` -> `Linear(x, W, b)`."""
    for node in nodes(model, "Add"):
        y, product, bias = node.outputs[0], operand(node), operand(node, 1)
        linear = made_by(product, "Linear", domain=INGOT)
        if linear is None or len(product.uses()) > 1 or len(linear.inputs) > 2:
            continue
        if _is_bias(bias, operand(linear, 1)):
            replace(y, new(node, "Linear", [*linear.inputs, bias], dims(y), y.dtype, INGOT))


def _weight(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The stored matrix the node multiplies by, as [N, K]; None if it is not one, or the node does more than that."""
    weight, turned = operand(node, 1), False
    if node.op_type == "Gemm":
        if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0):
            return None
        turned = bool(attribute(node, "transB", 0))
    elif (transpose := made_by(weight, "Transpose")) and list(attribute(transpose, "perm", ())) == [1, 0]:
        turned, weight = True, operand(transpose)
    if not weight.is_initializer() or len(dims(weight)) != 2:
        return None
    return weight if turned else pack(graph, transposed(weight), weight)


def _is_bias(value: ir.Value, weight: ir.Value) -> bool:
    return value.is_initializer() and value.dtype == weight.dtype and dims(value) == dims(weight)[:1]
