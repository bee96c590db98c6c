"""Activations through 8 bits: the nodes, their numbers against `calibration.formats`, and who shares them."""

import onnx_ir as ir
import pytest
import torch
from ingot.builder.passes.graph import nodes
from ingot.builder.passes.lowering import lower_quantised
from ingot.builder.passes.quantise_activation import quantise_activation
from ingot.builder.passes.verify import verify
from ingot.calibration.formats import Format, round_to_nearest
from ingot.engines.dtypes import DTYPES
from ingot.plugins.interpreter import Program

COLUMNS = 40
TENSOR, TOKEN, GROUP = Format("fp8_e4m3", rows=0), Format("int8"), Format("fp8_e4m3", group=16)


def two_linears(dtype="float32"):
    """x [T, 40] -> Abs -> a [T, 3], b [T, 5]."""
    kind = DTYPES[dtype].onnx
    x = ir.Value(name="x", shape=ir.Shape(["T", COLUMNS]), type=ir.TensorType(kind))
    positive = ir.node("Abs", [x])
    generator, made, weights = torch.Generator().manual_seed(0), [positive], []
    positive.outputs[0].shape, positive.outputs[0].type = x.shape, x.type
    for name, rows in (("a", 3), ("b", 5)):
        weight = torch.randn(rows, COLUMNS, generator=generator).to(getattr(torch, dtype))
        value = ir.Value(name=f"{name}.weight", shape=ir.Shape(weight.shape), type=ir.TensorType(kind))
        value.const_value = ir.tensor(weight, name=value.name)
        weights.append(value)
        made.append(ir.node("Linear", [positive.outputs[0], value], domain="ingot", name=name))
        made[-1].outputs[0].name = name
        made[-1].outputs[0].shape, made[-1].outputs[0].type = ir.Shape(["T", rows]), x.type
    positive.outputs[0].name = "positive"
    graph = ir.Graph([x], [node.outputs[0] for node in made[1:]], nodes=made, initializers=weights, name="two",
                     opset_imports={"": 23, "ingot": 1})  # fmt: skip
    return ir.Model(graph, ir_version=10), [value.const_value for value in weights]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [TENSOR, Format("int8", rows=0), TOKEN, Format("fp8_e4m3"), GROUP])
def test_the_numbers(form, dtype):
    model, weights = two_linears(dtype)
    scale = torch.tensor([0.013]) if form.rows == 0 else None
    for linear in nodes(model, "Linear"):
        quantise_activation(model, linear, form, scale)
    verify(model, "quantise_activation")
    assert len(nodes(model, "DequantizeLinear")) == 1 and len(nodes(model)) == 5  # both read the same numbers
    x = torch.randn(7, COLUMNS).to(getattr(torch, dtype))
    x[3] = 0
    taken = x.abs()
    if form == TOKEN:  # a scale for each token: 127.5, as `ranges` has it
        assert form.reach == 127.5
    expected = round_to_nearest(taken, form, scale).dequantise(taken.dtype)
    outputs = Program(model, {})({"x": x})
    for name, weight in zip("ab", weights, strict=True):
        assert torch.equal(outputs[name], torch.nn.functional.linear(expected, weight.raw))


def test_different_formats_and_scales_are_not_shared():
    model, _ = two_linears()
    a, b = nodes(model, "Linear")
    quantise_activation(model, b, TENSOR, torch.tensor(0.5))
    quantise_activation(model, a, TENSOR, torch.tensor(0.25))
    verify(model, "quantise_activation")
    assert len(nodes(model, "QuantizeLinear")) == 2
    model, _ = two_linears()
    a, b = nodes(model, "Linear")
    quantise_activation(model, b, TOKEN, None)
    quantise_activation(model, a, Format("fp8_e4m3"), None)
    verify(model, "quantise_activation")
    assert len(nodes(model, "QuantiseTokens")) == 2


def test_the_pass_for_targets_finds_them():
    model, _ = two_linears()
    a, b = nodes(model, "Linear")
    for linear, form, scale in ((a, TENSOR, torch.tensor(0.1)), (b, GROUP, None)):
        weight = linear.inputs[1]
        numbers = ir.Value(name=f"{linear.name}.q", shape=weight.shape, type=ir.TensorType(ir.DataType.INT8))
        scales = ir.Value(
            name=f"{linear.name}.s", shape=ir.Shape([weight.shape[0]]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        numbers.const_value = ir.tensor(torch.ones(tuple(weight.shape), dtype=torch.int8))
        scales.const_value = ir.tensor(torch.ones(weight.shape[0]))
        for value in (numbers, scales):
            model.graph.register_initializer(value)
        node = ir.node("DequantizeLinear", [numbers, scales], {"axis": 0, "output_dtype": 1})
        back = node.outputs[0]
        back.shape, back.type, back.name = weight.shape, weight.type, f"{linear.name}.d"
        model.graph.insert_before(linear, node)
        linear.replace_input_with(1, back)
        quantise_activation(model, linear, form, scale)
    x = torch.randn(4, COLUMNS)
    before = Program(model, {})({"x": x})
    lower_quantised(model)
    assert [node.attributes["x_group"].as_int() for node in nodes(model, "QuantisedLinear")] == [0, 16]
    after = Program(model, {})({"x": x})
    for name in "ab":
        torch.testing.assert_close(after[name], before[name])


def test_what_makes_no_sense():
    model, _ = two_linears()
    linear = nodes(model, "Linear")[0]
    for form, scale in ((TENSOR, None), (TOKEN, torch.ones(1)), (Format("int4"), None), (Format("int8", rows=2), None),
                        (Format("int8", symmetric=False), None)):  # fmt: skip
        with pytest.raises(ValueError, match="activation"):
            quantise_activation(model, linear, form, scale)
