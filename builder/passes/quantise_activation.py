"""Quantised activations in the graph: what a Linear reads goes through 8 bits and back, just before it.

Dynamic: QuantiseTokens computes a scale for each token, or for each group of its columns. Static: QuantizeLinear has
one scale for all, found by a calibration. Either is followed by DequantizeLinear, so the graph says what is computed in
ops that any target knows; `lowering.py` folds them into the product. Linears that read the same numbers in the same way
share the nodes.
"""

import onnx_ir as ir
import torch

from ...calibration.formats import Format
from .graph import INGOT, attribute, dims, operand

ELEMENTS = {"int8": ir.DataType.INT8, "fp8_e4m3": ir.DataType.FLOAT8E4M3FN}


def quantise_activation(model: ir.Model, linear: ir.Node, form: Format, scale: torch.Tensor | None) -> None:
    """Puts what `linear` reads, [T, K], into the format `form`, in place.

    `form.rows == 1`: a scale per token, or per `form.group` columns of it, and `scale` is None. `form.rows == 0`: one
    for everything, `scale` of one element. int8 or fp8_e4m3, symmetric.
    """
    static = form.rows == 0
    if form.dtype not in ELEMENTS or not form.symmetric or form.rows > 1 or (static and form.group):
        raise ValueError(f"activations cannot be quantised as {form}")
    if static != (scale is not None):
        raise ValueError("a static activation needs its scale, a dynamic one has none")
    x = operand(linear)
    number = None if scale is None else float(scale)
    result = _find(x, form, number) or _insert(model.graph, x, linear, form, number)
    linear.replace_input_with(0, result)


def _find(x: ir.Value, form: Format, scale: float | None) -> ir.Value | None:
    """What an earlier call for another Linear made of x."""
    wanted = "QuantiseTokens" if scale is None else "QuantizeLinear"
    for node in x.consumers():
        if node.op_type != wanted or node.inputs[0] is not x:
            continue
        kind = attribute(node, "dtype" if scale is None else "output_dtype")
        stored = None if scale is None else operand(node, 1).const_value
        same = stored is None or stored.numpy().item() == torch.tensor(scale, dtype=torch.float32).item()
        if kind == int(ELEMENTS[form.dtype]) and attribute(node, "group", 0) == form.group and same:
            return next(use.node for use in node.outputs[0].uses()).outputs[0]
    return None


def _insert(graph: ir.Graph, x: ir.Value, linear: ir.Node, form: Format, scale: float | None) -> ir.Value:
    """The two nodes, right after x is made, so that whichever Linear asked first does not matter."""
    element, (_, columns), name = int(ELEMENTS[form.dtype]), dims(x), (linear.name or "")
    assert isinstance(columns, int) and x.dtype is not None
    back = {"output_dtype": int(x.dtype)}
    if scale is None:
        options = {"dtype": element} | ({"group": form.group} if form.group else {})
        quantise = ir.node("QuantiseTokens", [x], options, domain=INGOT, num_outputs=2)
        groups = -(-columns // form.group) if form.group else 1
        _describe(quantise.outputs[1], f"{name}.x_scale", (dims(x)[0], groups), ir.DataType.FLOAT)
        factors = quantise.outputs[1]
        back |= {"axis": 1, "block_size": form.group or columns}
    else:
        factors = ir.Value(name=f"{name}.input_scale", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT))
        factors.const_value = ir.tensor(torch.tensor(scale, dtype=torch.float32), name=factors.name)
        graph.register_initializer(factors)
        quantise = ir.node("QuantizeLinear", [x, factors], {"output_dtype": element})
    _describe(quantise.outputs[0], f"{name}.x_quantised", dims(x), ir.DataType(element))
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], factors], back)
    _describe(dequantise.outputs[0], f"{name}.x_dequantised", dims(x), x.dtype)
    quantise.name, dequantise.name = f"{name}.quantise_x", f"{name}.dequantise_x"
    producer = x.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantise, dequantise])
    else:
        graph.insert_after(producer, [quantise, dequantise])
    return dequantise.outputs[0]


def _describe(value: ir.Value, name: str, shape: tuple, dtype: ir.DataType) -> None:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
