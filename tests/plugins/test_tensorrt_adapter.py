"""The plugins of the tensorrt target: what they answer while building, and what `enqueue` launches.

Without a GPU the launches go through Triton's interpreter, by the addresses that `enqueue` hands over, so that
lowering, plan, argument places and the plugin itself are compared with the graph's own meaning. TensorRT calls none of
it here.
"""

import ctypes
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from fake_driver import FakeDriver
from hand_made import DEMO
from plan_run import padded
from tensorrt_build import write_graph

pytest.importorskip("triton")
pytest.importorskip("tensorrt_rtx_bindings")

from ingot.builder.passes.graph import INGOT
from ingot.builder.targets import tactics
from ingot.builder.targets.cubin import Cubin
from ingot.builder.targets.fusion import fuse, rotary_attentions
from ingot.builder.targets.planner import Sizes
from ingot.builder.targets.tensorrt import plugin_plan
from ingot.builder.targets.tensorrt.lowering import LOWERINGS, lower
from ingot.engines import step
from ingot.engines.errors import EngineError
from ingot.engines.tensorrt import PluginNode, Plugins, shape_key
from ingot.engines.weights import load_graph, open_weights
from ingot.plugins import gpu as gpus
from ingot.plugins import jit
from ingot.plugins.interpreter import Program
from ingot.plugins.tactic import Device
from ingot.plugins.tensorrt.adapter import plugin_class
from ingot.plugins.tensorrt.launcher import Launcher
from ingot.plugins.tensorrt.schema_shapes import output_shapes, output_types

PAGE, NUM_PAGES, LENGTH = 16, 9, 64
SIZES = [Sizes(2, 2, 2, 1, 32), Sizes(2, 2, 2, 1), Sizes(32, 2, 2, 0)]
BF16, INT32 = 16, 6


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """pycoder-draft-2m in fp32, in ingot's ops, and its weights."""
    folder = tmp_path_factory.mktemp("llama")
    write_graph(DEMO / "pycoder-draft-2m", folder, "float32")
    return load_graph(folder), open_weights(folder)


def lowered(graph, plugins):
    fusions = (rotary_attentions,) if "Rope" in plugins else ()
    model = ir.Model(fuse(graph.graph, fusions), ir_version=graph.ir_version)
    lower(model, plugins)
    return model


@pytest.fixture
def planned(graph, monkeypatch, tmp_path):
    """The plan of the lowered graph with cubins that hold nothing, the kernels they stand for, and what is saved."""

    def compile_all(sources, capability):
        return {source: Cubin(b"\x7fELF", f"k{i}", 0, source.num_warps, True) for i, source in enumerate(sources)}

    made = []
    monkeypatch.setattr(tactics, "compile_all", compile_all)
    monkeypatch.setattr(plugin_plan, "PluginPlanner", spy := type("Spy", (plugin_plan.PluginPlanner,), {}))
    monkeypatch.setattr(spy, "__post_init__", lambda self: (made.append(self), super(spy, self).__post_init__())[1])

    def plan(plugins):
        model = lowered(graph[0], plugins)
        found = plugin_plan.plan_plugins(model.graph, SIZES, Device(89, 8), PAGE, LENGTH, tmp_path)
        Plugins("m", "1", 89, ((0, 1, 2),), found.page_columns, found.kernels).save(tmp_path)
        return model, found, Plugins.open(tmp_path), list(made[-1].kernels)

    return plan


class HostGpu:
    """Kernels run in Triton's interpreter on the memory of the host."""

    def __init__(self, kernels):
        self._kernels, self._loaded, self._memory = kernels, 0, []
        self.launches = 0

    def allocate(self, num_bytes, what):
        self._memory.append(np.full(max(16, num_bytes), 0xFF, np.uint8))
        return self._memory[-1].ctypes.data

    def fill(self, address, num_bytes, byte, stream):
        ctypes.memset(address, byte, num_bytes)

    def stream(self):
        return 1

    def synchronise(self, stream):
        pass

    def load_number(self, kernel):
        def launch(grid, stream, arguments, *, apart=False):
            self.launches += 1
            types = [kind for _, kind in kernel.signature]
            values = [_at(a, kind) if isinstance(a, gpus.Address) else a
                      for a, kind in zip(arguments, types, strict=True)]  # fmt: skip
            jit.launch_kernel(kernel, grid, values)

        return SimpleNamespace(launch=launch)


def _at(address, kind):
    """A tensor that begins at the address; the interpreter asks for no more."""
    buffer = (ctypes.c_uint8 * 16).from_address(address.value)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(jit.ELEMENTS[kind])


def launcher_on_host(monkeypatch, found, saved, kernels, folder):
    gpu = HostGpu(kernels)
    used = sorted({x.cubin for k in saved.kernels.values() for part in k.launches.values() for x in part})
    monkeypatch.setattr("ingot.plugins.tensorrt.launcher._load",
                        lambda *_: {number: gpu.load_number(kernels[number]) for number in used})  # fmt: skip
    return gpu, Launcher(gpu, folder, found.plan, saved)


def binders(found, launcher, run=lambda enqueue: enqueue(1)):
    """The interpreter's nodes of domain ingot by the plugin's `enqueue`, on poisoned outputs and workspace.

    run: calls its argument with a stream, in whatever way is tested.
    """
    plugins = {node: plugin_class()(node, 0, launcher) for node in found.nodes.values()}

    def bind_op(op):
        def bind(attributes, constants):
            return lambda *inputs: enqueue(op, attributes, inputs)

        return bind

    def enqueue(op, attributes, inputs):
        present = {i: x.contiguous() for i, x in enumerate(inputs) if x is not None}
        shapes = [list(x.shape) for x in present.values()]
        key = shape_key(shape for shape in shapes if len(shape) != 4)
        node = next(  # layers that are alike share one
            node for node in plugins
            if (node.op, node.inputs) == (op, tuple(present)) and key in found.kernels[node.kernels].launches
            and all(attributes[name] == node.attributes[name] for name in attributes if name != "layer")
        )  # fmt: skip
        device = inputs[0].device
        size = found.kernels[node.kernels].workspace + 16
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
        outputs = [torch.full(sizes, torch.nan, device=device) for sizes in output_shapes(node, shapes)]
        descriptions = [SimpleNamespace(dims=shape) for shape in shapes]
        pointers = [x.data_ptr() for x in present.values()], [y.data_ptr() for y in outputs]
        run(lambda stream: plugins[node].enqueue(descriptions, [], *pointers, workspace.data_ptr(), stream))
        return tuple(outputs[: node.num_outputs]) if node.num_outputs > 1 else outputs[0]

    return {op: bind_op(op) for op in {node.op for node in plugins}}


def steps(vocab=4096):
    """Two sequences: their prompts in one step, then two steps of decoding."""
    pages = torch.tensor([[3, 5], [1, 8]], dtype=torch.int32)
    lengths = torch.tensor([19, 7])
    generator = torch.Generator().manual_seed(3)
    for counts, before in (((19, 7), (0, 0)), ((1, 1), (19, 7)), ((1, 1), (20, 8))):
        counts, before = torch.tensor(counts), torch.tensor(before)
        positions = torch.cat([torch.arange(b, b + n) for b, n in zip(before, counts, strict=True)])
        owner = torch.arange(2).repeat_interleave(counts)
        starts = torch.tensor([0, *counts.cumsum(0).tolist()])
        yield {name: tensor.to(torch.int32) for name, tensor in {
            step.TOKENS: torch.randint(3, vocab, (int(counts.sum()),), generator=generator),
            step.POSITIONS: positions, step.SLOTS: pages[owner, positions // PAGE] * PAGE + positions % PAGE,
            step.QUERY_START: starts, step.KV_LEN: before + counts, step.PAGES: pages,
            step.LOGIT_ROWS: starts[1:] - 1,
        }.items()}  # fmt: skip
    assert lengths.sum() == 26


def empty_pools(graph):
    return {value.name: torch.full((NUM_PAGES, PAGE, *(int(d) for d in value.shape[2:])), torch.nan)
            for value in graph.graph.inputs if "pages." in value.name}  # fmt: skip


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", [(), ("Rope",), tuple(LOWERINGS)])
def test_the_lowered_graph_means_the_same(graph, plugins):
    model, weights = graph
    other = lowered(model, plugins)
    left = {node.op_type for node in other.graph if node.domain == INGOT}
    fused = {"RotaryPagedAttention"} if "Rope" in plugins else {"PagedAttention"}
    assert left == {"RotaryCosSin"} | fused | set(plugins) - {"Rope"}
    whole, again = Program(model, weights), Program(other, weights)
    ours, theirs = empty_pools(model), empty_pools(model)
    for inputs in steps():
        expected, found = whole({**inputs, **theirs})[step.LOGITS], again({**inputs, **ours})[step.LOGITS]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's memory is the host's")
@pytest.mark.parametrize("plugins", [("Rope",), ("GatedActivation", "RMSNorm")])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
def test_enqueue_computes_what_the_graph_does(graph, planned, plugins, monkeypatch, tmp_path):
    """Prompts in the bucket for any step, then decoding in the one for short contexts and in the other."""
    model, found, saved, kernels = planned(plugins)
    gpu, launcher = launcher_on_host(monkeypatch, found, saved, kernels, tmp_path)
    whole = Program(graph[0], graph[1])
    with_plugins = Program(model, graph[1], binders(found, launcher))
    ours, theirs = empty_pools(graph[0]), empty_pools(graph[0])
    for bucket, inputs in zip((2, 0, 1), steps(), strict=True):
        expected = whole({**inputs, **theirs})[step.LOGITS]
        padding = padded(inputs, found.plan.buckets[bucket], found.page_columns[bucket])
        before = gpu.launches
        logits = with_plugins({**padding, **ours})[step.LOGITS][: len(expected)]
        assert gpu.launches - before >= len(found.nodes)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("plugins", [("Rope",), tuple(op for op in LOWERINGS if op != "Rope"), tuple(LOWERINGS)])
def test_enqueue_in_a_cuda_graph(graph, plugins, tmp_path):
    """The same on a GPU: real cubins, device buffers, each `enqueue` captured in a CUDA graph and replayed twice."""
    gpu = gpus.Gpu()
    model = lowered(graph[0], plugins)
    found = plugin_plan.plan_plugins(model.graph, SIZES, gpu.device, PAGE, LENGTH, tmp_path)
    saved = Plugins("m", "1", gpu.device.capability, ((0, 1, 2),), found.page_columns, found.kernels)
    launcher, stream = Launcher(gpu, tmp_path, found.plan, saved), gpu.stream()

    def captured(enqueue):
        torch.cuda.synchronize()
        made = gpu.capture(lambda: enqueue(stream), stream)
        for _ in range(2):  # nothing of the first is left to mislead the second
            gpu.replay(made, stream)
        gpu.synchronise(stream)
        gpu.discard(made)

    whole = Program(graph[0], graph[1])
    weights = {name: weight.cuda() for name, weight in graph[1].items()}
    with_plugins = Program(model, weights, binders(found, launcher, captured))
    theirs = empty_pools(graph[0])
    ours = {name: pool.cuda() for name, pool in theirs.items()}
    for bucket, inputs in zip((2, 0, 1), steps(), strict=True):
        expected = whole({**inputs, **theirs})[step.LOGITS]
        padding = padded(inputs, found.plan.buckets[bucket], found.page_columns[bucket])
        padding = {name: tensor.cuda() for name, tensor in padding.items()}
        logits = with_plugins({**padding, **ours})[step.LOGITS][: len(expected)].cpu()
        torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
    gpu.release()


def test_enqueue_neither_allocates_nor_waits(planned, monkeypatch, tmp_path):
    model, found, saved, _ = planned(("Rope",))
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
    _, found, saved, _ = planned(("Rope",))
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    launcher = Launcher(gpus.Gpu(), tmp_path, found.plan, saved)
    node = next(node for node in found.nodes.values() if node.op == "RotaryCosSin")
    with pytest.raises(EngineError, match="RotaryCosSin was asked to run on the shapes 3,.*expected one of 2,"):
        launcher.launch(node, [(3,), (32,)], [1, 2], [3], 4, 5)
