"""Quantised models in the forms that TensorRT has products for.

It multiplies FP8 and INT8 numbers where both sides of a Gemm are DequantizeLinear with constant scales: static
activations are that already, and a scale for each token is taken out of the product and applied to its sums. Other
scales that a step computes are multiplied by in plain sight, and zero points are taken out of INT4 weights.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch

from ....engines.errors import BuildError
from ....plugins.dtypes import TORCH_DTYPES, to_torch
from ....plugins.quantise_tokens.reference import REACH, SMALLEST_SCALE
from ...passes.graph import (
    INGOT,
    attribute,
    attributes,
    constant,
    dims,
    made_by,
    new,
    nodes,
    operand,
    replace,
    reshape,
    size,
)
from .spelling import cast, like

FLOAT, INT4 = ir.DataType.FLOAT, ir.DataType.INT4


def quantise_tokens(node: ir.Node) -> bool:
    """QuantiseTokens -> largest magnitude, division and QuantizeLinear, which fuse with what makes x."""
    x, dtype = operand(node), attribute(node, "dtype")
    tokens, group = dims(x)[0], attribute(node, "group", 0) or size(x, 1)
    if size(x, 1) % group:
        return False
    rows = reshape(node, cast(node, x, FLOAT), (tokens, size(x, 1) // group, group))
    reach = new(node, "ReduceMax", [like(node, "Abs", rows), constant(node, torch.tensor([2]))],
                (*dims(rows)[:2], 1), FLOAT, keepdims=1)  # fmt: skip
    scale = like(node, "Div", reach, _number(node, REACH[TORCH_DTYPES[dtype]]))
    scale = like(node, "Max", scale, _number(node, SMALLEST_SCALE))  # where all is 0, and then so is the product
    values = reshape(node, like(node, "Div", rows, scale), dims(x))
    values = new(node, "QuantizeLinear", [values, _number(node, 1.0)], dims(x), ir.DataType(dtype), output_dtype=dtype)
    replace(node.outputs[0], values)
    replace(node.outputs[1], reshape(node, scale, dims(node.outputs[1])))
    return True


def token_products(model: ir.Model) -> None:
    """Linear of numbers with a scale for each token -> a Gemm of numbers, its fp32 sums times that scale."""
    for node in nodes(model, "Linear"):
        x, weight = (made_by(value, "DequantizeLinear") for value in node.inputs[:2])
        if x is None or weight is None or made_by(operand(x), "QuantiseTokens", domain=INGOT) is None:
            continue
        y, numbers, scale = node.outputs[0], operand(x), operand(x, 1)
        of_rows = len(weight.inputs) == 2 and attribute(weight, "axis", 1) == 0
        if dims(scale)[1] != 1 or not of_rows or operand(weight).dtype != numbers.dtype:
            continue
        one_by_one = [
            new(node, "DequantizeLinear", [values, factors], dims(values), FLOAT, axis=0, output_dtype=int(FLOAT))
            for values, factors in ((numbers, _number(node, 1.0)), (operand(weight), operand(weight, 1)))
        ]
        sums = like(node, "Mul", new(node, "Gemm", one_by_one, dims(y), FLOAT, transB=1), scale)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            sums = like(node, "Add", sums, cast(node, operand(node, 2), FLOAT))
        replace(y, cast(node, sums, y.dtype))


def tables(model: ir.Model) -> None:
    """Rows of a stored table, taken back -> rows of the table: TensorRT has no stored numbers but in front of a
    DequantizeLinear."""
    for node in nodes(model, "DequantizeLinear"):
        y, rows, scales = node.outputs[0], *(made_by(value, "Gather") for value in node.inputs[:2])
        if rows is None or scales is None or not operand(rows).is_initializer():
            continue
        stored = [operand(rows), operand(scales)]
        whole = new(node, "DequantizeLinear", stored, dims(stored[0]), y.dtype, axis=0, output_dtype=int(y.dtype or 0))
        replace(y, new(node, "Gather", [whole, operand(rows, 1)], dims(y), y.dtype, axis=0))


def token_scales(model: ir.Model) -> None:
    """DequantizeLinear of QuantiseTokens that no product takes -> numbers times scales.

    Raises BuildError: groups of columns of which the last is smaller.
    """
    for node in nodes(model, "DequantizeLinear"):
        values, scale, y = operand(node), operand(node, 1), node.outputs[0]
        maker = made_by(values, "QuantiseTokens", domain=INGOT)
        if maker is None or not dims(scale):
            continue
        numbers = new(node, "DequantizeLinear", [values, _number(node, 1.0)], dims(values), FLOAT)
        tokens, width = dims(values)[0], size(values, 1)
        group = attribute(maker, "group", 0) or width
        if width % group:
            raise BuildError(
                f"the tensorrt target has no scales for groups of {group} in the {width} columns of '{y.name}'; "
                "use the recipe `fp8` or `fp8-static`, or build for `--target cuda`."
            )
        factors = reshape(node, scale, (tokens, width // group, 1))
        numbers = reshape(node, numbers, (tokens, width // group, group))
        replace(y, cast(node, reshape(node, like(node, "Mul", numbers, factors), dims(y)), y.dtype))


def zero_points(model: ir.Model) -> None:
    """Linear of INT4 with zero points z: x (q - z)'s = x q's - sums of x (z s)', the sums those of each group."""
    for node in nodes(model, "Linear"):
        weight = made_by(operand(node, 1), "DequantizeLinear")
        if weight is None or len(weight.inputs) < 3 or operand(weight).dtype != INT4:
            continue
        x, y, scale, zero = operand(node), node.outputs[0], operand(weight, 1), operand(weight, 2)
        tokens, width = dims(x)[0], size(x, 1)
        group = attribute(weight, "block_size", 0) or width
        if width % group:
            continue  # which TensorRT refuses
        groups = width // group
        parts = reshape(node, cast(node, x, FLOAT), (tokens, groups, group))
        sums = new(node, "ReduceSum", [parts, constant(node, torch.tensor([2]))], (tokens, groups), FLOAT, keepdims=0)
        shift = new(node, "Gemm", [sums, _shift(model, scale, zero, groups)], dims(y), FLOAT, transB=1)
        bare = new(
            node,
            "DequantizeLinear",
            [operand(weight), scale],
            dims(operand(weight)),
            weight.outputs[0].dtype,
            **attributes(weight),
        )
        whole = new(node, "Linear", [x, bare, *node.inputs[2:]], dims(y), y.dtype, INGOT)
        replace(y, cast(node, like(node, "Sub", cast(node, whole, FLOAT), shift), y.dtype))


def _shift(model: ir.Model, scale: ir.Value, zero: ir.Value, groups: int) -> ir.Value:
    """zero * scale, [N, G] fp32, as an initialiser that is computed when it is read."""
    name = f"{scale.name}.shift"
    if name not in model.graph.initializers:
        shape = ir.Shape((dims(scale)[0], groups))
        assert scale.const_value is not None and zero.const_value is not None
        make = partial(_product, scale.const_value, zero.const_value, name)
        data = ir.LazyTensor(make, FLOAT, shape, name=name)
        model.graph.register_initializer(ir.Value(name=name, type=ir.TensorType(FLOAT), shape=shape, const_value=data))
    return model.graph.initializers[name]


def _product(scale: ir.TensorProtocol, zero: ir.TensorProtocol, name: str) -> ir.Tensor:
    product = to_torch(scale).float() * torch.from_numpy(zero.numpy().astype("float32"))
    return ir.Tensor(product.reshape(len(product), -1).numpy(), name=name)


def round_int4_scales(model: ir.Model) -> None:
    """Scales of INT4 weights in the type of what is dequantised: TensorRT has no INT4 with another one. Rounding a
    scale to bf16 changes a weight by 0.2% at most, which is little beside a step of INT4. Other formats stay."""
    for node in nodes(model, "DequantizeLinear"):
        y, scale = node.outputs[0], operand(node, 1)
        tensor = scale.const_value
        if operand(node).dtype != INT4 or tensor is None or y.dtype is None or tensor.dtype == y.dtype:
            continue
        rounded = ir.LazyTensor(
            partial(_converted, tensor, y.dtype), y.dtype, ir.Shape(dims(scale)), name=f"{scale.name}.rounded"
        )
        value = ir.Value(name=rounded.name, type=ir.TensorType(y.dtype), shape=scale.shape, const_value=rounded)
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)


def _number(before: ir.Node, number: float) -> ir.Value:
    return constant(before, torch.tensor(number, dtype=torch.float32))
