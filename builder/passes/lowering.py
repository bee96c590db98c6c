"""What targets run in place of the Q/DQ form in which `model.onnx` holds a quantised model.

`model.onnx` says in standard ops what is computed: DequantizeLinear of a weight, and where activations are quantised
too, QuantiseTokens (a scale for each token) or QuantizeLinear (one for all) with DequantizeLinear, around each Linear.
A target lowers a copy of it, so that products are of the stored numbers and scales are applied to the sums.
"""

import onnx_ir as ir

from .graph import INGOT, attribute, dims, made_by, new, nodes, operand, replace


def lower_quantised(model: ir.Model) -> None:
    """Linear of dequantised weights, and of dequantised activations -> QuantisedLinear."""
    for node in nodes(model, "Linear"):
        y, x = node.outputs[0], operand(node)
        weight = made_by(node.inputs[1], "DequantizeLinear")
        if weight is None or not operand(weight).is_initializer() or y.dtype is None:
            continue
        numbers, scale, *zero = weight.inputs
        x_scale, options = None, {"group": _group(weight)}
        if (found := _quantised(x)) is not None:
            x, x_scale = operand(found), operand(found, 1)
            options["x_group"] = _group(found)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [x, numbers, scale, zero[0] if zero else None, x_scale, bias]
        replace(y, new(node, "QuantisedLinear", inputs, dims(y), y.dtype, INGOT, dtype=int(y.dtype), **options))


def _quantised(x: ir.Value) -> ir.Node | None:
    """The DequantizeLinear of activations that were quantised for a product, if x is its output."""
    node = made_by(x, "DequantizeLinear")
    if node is None or len(node.inputs) > 2:  # no zero points
        return None
    source = operand(node)
    if made_by(source, "QuantizeLinear") or made_by(source, "QuantiseTokens", domain=INGOT):
        return node
    return None


def _group(node: ir.Node) -> int:
    """Columns that share a scale; 0: a whole row, or everything."""
    scales = dims(operand(node, 1))
    return 0 if not scales or scales[-1] == 1 else attribute(node, "block_size", 0)
