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


def attention(rotated=3, packed=True):
    """q|k|v of 2 + 1 heads of 4 -> Rope of `rotated` heads -> PagedAttention, packed or not."""
    register_schemas()
    kinds = {"x": 12, "cos_sin": 4, "k": 4, "v": 4}
    values = {name: ir.Value(name=name, shape=ir.Shape(["T", width]), type=ir.TensorType(ir.DataType.FLOAT))
              for name, width in kinds.items()}  # fmt: skip
    shapes = {"slots": ["T"], "query_start": ["S+1"], "kv_len": ["S"], "pages": ["S", "P"]}
    for name, shape in shapes.items():
        values[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT32))
    for name in ("k_pages", "v_pages"):
        values[name] = ir.Value(name=name, shape=ir.Shape(["N", 16, 1, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    step = [values[name] for name in (*shapes, "k_pages", "v_pages")]
    rope = ir.node("Rope", [values["x"], values["cos_sin"]], {"num_heads": rotated, "head_dim": 4, "interleaved": 1},
                   domain="ingot")  # fmt: skip
    between = rope.outputs[0]
    between.shape, between.type = ir.Shape(["T", 12]), ir.TensorType(ir.DataType.FLOAT)
    keys = [None, None] if packed else [values["k"], values["v"]]
    options = dict(layer=0, num_heads=2 if packed else 3, num_kv_heads=1, head_dim=4, v_head_dim=4, scale=0.5)
    node = ir.node("PagedAttention", [between, *keys, *step], options, domain="ingot")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["T", 4 * options["num_heads"]]), ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([v for v in values.values() if packed or v.name], [y], nodes=[rope, node],
                    opset_imports={"": 23, "ingot": 1}, name="attention")  # fmt: skip


def test_keys_are_rotated_on_their_way_to_the_pool():
    (node,) = fuse(attention())
    assert node.op_type == "RotaryPagedAttention"
    names = "x cos_sin slots query_start kv_len pages k_pages v_pages".split()
    assert [value.name for value in node.inputs] == names
    assert node.attributes["interleaved"].value == 1 and node.attributes["num_heads"].value == 2


@pytest.mark.parametrize("options", [dict(rotated=2), dict(packed=False)])
def test_a_rotation_of_other_heads_stays(options):
    assert ops(fuse(attention(**options))) == ["Rope", "PagedAttention"]
