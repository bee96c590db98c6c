"""The plugins of the tensorrt target while an engine is built and opened, and the graph that is lowered around them.

What `enqueue` computes is in `test_tensorrt_enqueue.py`.
"""

from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch
from fake_driver import FakeDriver
from families import VOCAB
from tensorrt_build import checkpoint_of, recipe_of, write_graph
from tensorrt_run import (
    NUM_PAGES,
    PAGE,
    empty_pools,
    lowered,
    plan_of,
    quantised,
    steps,
    weights_of,
    without_cubins,
)

pytest.importorskip("triton")
pytest.importorskip("tensorrt_rtx_bindings")

from ingot.builder.passes.graph import INGOT, made_by, nodes
from ingot.builder.targets.tensorrt.lowering import LOWERINGS
from ingot.engines import step
from ingot.engines.errors import BuildError, EngineError
from ingot.engines.tensorrt import PluginNode
from ingot.engines.weights import load_graph, open_weights
from ingot.plugins import gpu as gpus
from ingot.plugins.interpreter import Program
from ingot.plugins.tactic import Device
from ingot.plugins.tensorrt.adapter import plugin_class
from ingot.plugins.tensorrt.launcher import Launcher
from ingot.plugins.tensorrt.schema_shapes import output_shapes, output_types

BF16, INT32 = 16, 6
FP8, INT8 = "dtype: fp8_e4m3", "dtype: int8"


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A small mistral in fp32, in ingot's ops, with a bias on one of its products, and its weights."""
    folder = tmp_path_factory.mktemp("llama")
    write_graph(checkpoint_of("mistral", folder / "checkpoint"), folder, "float32")
    model, weights = load_graph(folder), dict(open_weights(folder))
    linear = nodes(model, "Linear")[0]
    torch.manual_seed(0)
    weights["bias"] = torch.randn(int(linear.outputs[0].shape[1]))
    bias = ir.Value(name="bias", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weights["bias"].shape))
    bias.const_value = ir.tensor(weights["bias"])
    model.graph.register_initializer(bias)
    linear.resize_inputs(3)
    linear.replace_input_with(2, bias)
    return model, weights


@pytest.fixture
def planned(graph, monkeypatch, tmp_path):
    """The plan of the lowered graph, and what is saved of it."""
    without_cubins(monkeypatch)
    return plan_of(lowered(graph[0], ("Rope",)), Device(89, 8), tmp_path)


# -- building ----------------------------------------------------------------------------------------------------------


RECIPES = {
    "tokens fp8": recipe_of(FP8, FP8), "tokens int8": recipe_of(INT8, INT8),
    "groups": recipe_of(f"{FP8}, group: 32", f"{FP8}, group: 32"), "static": recipe_of(FP8, f"{FP8}, rows: 0"),
    "zero points": recipe_of("dtype: int4, group: 32", symmetric=False),
    "table": recipe_of(INT8, match="*embed*"), "tokens of int4": recipe_of("dtype: int4, group: 32", INT8),
}  # fmt: skip
EVERY = tuple(LOWERINGS)


@pytest.mark.parametrize("plugins, recipe", [
    ((), None), (("Rope",), None), (EVERY, None), (("Rope", "QuantiseTokens"), "tokens int8"), (EVERY, "groups"),
    *(((), recipe) for recipe in RECIPES),
])  # fmt: skip
def test_the_lowered_graph_means_the_same(graph, plugins, recipe):
    model, weights = quantised(*graph, RECIPES.get(recipe))
    other = lowered(model, plugins)
    left = {node.op_type for node in other.graph if node.domain == INGOT}
    fused = {"RotaryPagedAttention"} if "Rope" in plugins else {"PagedAttention"}
    unused = {"Rope"} if recipe else {"Rope", "QuantiseTokens"}
    assert left == {"RotaryCosSin"} | fused | set(plugins) - unused
    read = [[made_by(value, "DequantizeLinear") for value in node.inputs[:2]] for node in nodes(other, "Gemm")]
    numbers = [both for both in read if all(both)]
    assert len(numbers) == (9 if recipe in ("tokens fp8", "tokens int8", "static") and "Linear" not in plugins else 0)
    if "Linear" not in plugins:
        assert all(len(node.inputs) == 2 for node in nodes(other, "DequantizeLinear")), "no zero points"
    whole, again = Program(model, weights), Program(other, weights_of(other, weights))
    ours, theirs = empty_pools(model), empty_pools(model)
    for inputs in steps(VOCAB):
        expected, found = whole({**inputs, **theirs})[step.LOGITS], again({**inputs, **ours})[step.LOGITS]
        off = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        # of what is read, a number may be rounded to its neighbour, and those that follow from it differ
        assert off < (2e-2 if "tokens" in (recipe or "") else 1e-5)


def test_groups_that_do_not_divide_the_columns(graph):
    model, _ = quantised(*graph, recipe_of(f"{FP8}, group: 60", f"{FP8}, group: 60"))
    with pytest.raises(BuildError, match="groups of 60 in the [69][46] columns of .*`fp8` or `fp8-static`"):
        lowered(model, ())


def test_outputs_are_those_of_the_schema():
    attributes = dict(layer=0, num_heads=6, num_kv_heads=2, head_dim=64, v_head_dim=32, scale=0.125)
    node = PluginNode(
        "PagedAttention", attributes, (0, 3, 4, 5, 6, 7, 8), (BF16, *[INT32] * 4, BF16, BF16), (5, 6), 1, "k"
    )
    assert PluginNode.of(node.text()).text() == node.text()
    shapes = [(None, 576), (None,), (None,), (None,), (None, None), (None, 16, 2, 64), (None, 16, 2, 32)]
    assert output_types(node) == [BF16] * 3
    assert output_shapes(node, shapes) == [[(0, 0), 192], [(5, 0), 16, 2, 64], [(6, 0), 16, 2, 32]]


def test_a_plugin_says_which_outputs_are_pools():
    from ingot.plugins.tensorrt import api as trt

    node = PluginNode("PagedAttention", {}, (0, 3, 4, 5, 6, 7, 8), (BF16,) * 7, (5, 6), 1, "k")
    plugin = plugin_class()(node, 1234, None).clone()
    assert plugin.num_outputs == 3 and [plugin.get_aliased_input(i) for i in range(3)] == [-1, 5, 6]
    assert plugin.get_workspace_size([], []) == 1234
    (field,) = plugin.get_fields_to_serialize()
    assert bytes(field.data).rstrip(b"\0").decode() == node.text()
    assert plugin.get_capability_interface(trt.PluginCapabilityType.BUILD) is plugin


# -- running -----------------------------------------------------------------------------------------------------------


def test_enqueue_neither_allocates_nor_waits(planned, monkeypatch, tmp_path):
    found, saved = planned
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    launcher = Launcher(gpus.Gpu(), tmp_path, found.plan, saved)
    before = dict(driver.calls)
    for node in found.nodes.values():
        plugin = plugin_class()(node, 0, launcher)
        for key, launches in saved.kernels[node.kernels].launches.items():
            shapes = [tuple(map(int, part.split("x"))) for part in key.split(",")]
            shapes += [(NUM_PAGES, PAGE, 1, 1)] * len(node.pools)
            many = len(node.inputs)
            count = driver.calls["cuLaunchKernelEx"]
            plugin.enqueue([SimpleNamespace(dims=s) for s in shapes], [], list(range(1, many + 1)), [99], 7, 5)
            assert driver.calls["cuLaunchKernelEx"] - count == len(launches)
    changed = {name for name, count in driver.calls.items() if count != before.get(name, 0)}
    assert changed == {"cuLaunchKernelEx"}


def test_shapes_of_no_bucket_are_refused(planned, monkeypatch, tmp_path):
    found, saved = planned
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    launcher = Launcher(gpus.Gpu(), tmp_path, found.plan, saved)
    node = next(node for node in found.nodes.values() if node.op == "RotaryCosSin")
    with pytest.raises(EngineError, match="RotaryCosSin was asked to run on the shapes 3,.*expected one of 2,"):
        launcher.launch(node, [(3,), (32,)], [1, 2], [3], 4, 5)
