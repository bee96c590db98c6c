"""Fusions of the cuda target: what they take, what they leave, and that the engine's own graph stays as it was."""

import onnx_ir as ir
import pytest
import torch
from ingot.builder.targets.fusion import fuse
from ingot.plugins import register_schemas


def mlp(shared=False, between=None):
    """x [T, 8] -> Linear to 2 x 6 -> GatedActivation; `shared`: the product is an output, too."""
    register_schemas()
    x = ir.Value(name="x", shape=ir.Shape(["T", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="w", shape=ir.Shape([12, 8]), type=ir.TensorType(ir.DataType.FLOAT),
                      const_value=ir.tensor(torch.randn(12, 8).numpy(), name="w"))  # fmt: skip
    product = ir.node("Linear", [x, weight], domain="ingot")
    last = product.outputs[0]
    last.shape, last.type = ir.Shape(["T", 12]), ir.TensorType(ir.DataType.FLOAT)
    nodes = [product]
    if between:
        nodes.append(ir.node(between, [last]))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = last.shape, last.type
        last = nodes[-1].outputs[0]
    gated = ir.node("GatedActivation", [last], {"activation": "silu"}, domain="ingot")
    y = gated.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["T", 6]), ir.TensorType(ir.DataType.FLOAT)
    outputs = [y] + ([product.outputs[0]] if shared else [])
    return ir.Graph([x], outputs, nodes=[*nodes, gated], initializers=[weight],
                    opset_imports={"": 23, "ingot": 1}, name="mlp")  # fmt: skip


def ops(graph):
    return [node.op_type for node in graph]


def test_a_product_and_its_activation_become_one():
    graph = mlp()
    fused = fuse(graph)
    assert ops(fused) == ["GatedLinear"] and fused.outputs[0].name == "y"
    (node,) = fused
    assert node.attributes["activation"].value == "silu" and [v.name for v in node.inputs] == ["x", "w"]
    assert ops(graph) == ["Linear", "GatedActivation"], "the engine's graph is another's, too"


@pytest.mark.parametrize("options", [dict(shared=True), dict(between="Tanh")])
def test_a_product_that_others_read_stays(options):
    assert "GatedLinear" not in ops(fuse(mlp(**options)))
