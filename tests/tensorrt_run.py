"""Runs the plugins of a lowered graph by their `enqueue`, node by node, each compared with the op's definition.

Kernels go through Triton's interpreter on the host's memory, or through a GPU's driver. TensorRT takes no part: where
it is not installed, classes that are empty stand for the bases of the plugin class (`without_tensorrt`).
"""

import ctypes
import importlib.util
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from ingot.builder.targets import tactics
from ingot.builder.targets.buckets import Sizes
from ingot.builder.targets.cubin import Cubin
from ingot.builder.targets.fusion import fuse, rotary_attentions
from ingot.builder.targets.tensorrt import plugin_plan
from ingot.builder.targets.tensorrt.lowering import lower
from ingot.engines import step
from ingot.engines.tensorrt import Plugins, shape_key
from ingot.plugins import OPS, jit
from ingot.plugins import gpu as gpus
from ingot.plugins.dtypes import TORCH_DTYPES, to_torch
from ingot.plugins.interpreter import Program
from ingot.plugins.tensorrt import adapter, api
from ingot.plugins.tensorrt.launcher import Launcher
from ingot.plugins.tensorrt.schema_shapes import output_shapes, output_types
from plan_run import padded
from tensorrt_build import in_fewer_bits

PAGE, NUM_PAGES, LENGTH = 16, 9, 64
SIZES = [Sizes(2, 2, 2, 1, 32), Sizes(2, 2, 2, 1), Sizes(24, 2, 2, 0)]
EIGHT_BITS = torch.int8, torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2}
INSTALLED = any(importlib.util.find_spec(name) for name in api.MODULES)


@pytest.fixture(autouse=True)
def without_tensorrt(monkeypatch):
    """`enqueue` needs no TensorRT but for the classes that its plugin derives from."""
    if not INSTALLED:
        names = "IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuildV2", "IPluginV3OneRuntime"
        stand_in = SimpleNamespace(**{name: type(name, (), {}) for name in names})
        monkeypatch.setattr(api, "module", lambda: stand_in)


def quantised(model, weights, recipe=None, pages="", per_head=False):
    """A copy of a graph in fewer bits (`tensorrt_build.in_fewer_bits`), and its weights."""
    copy = model.clone()
    in_fewer_bits(copy, recipe, pages, per_head)
    return copy, weights_of(copy, weights)


def weights_of(model, weights, device="cpu"):
    """Every initialiser, whether it is in the checkpoint or made from it."""
    return {name: (weights[name] if name in weights else to_torch(value.const_value)).to(device)
            for name, value in model.graph.initializers.items()}  # fmt: skip


def lowered(model, plugins):
    fusions = (rotary_attentions,) if "Rope" in plugins else ()
    model = ir.Model(fuse(model.graph, fusions), ir_version=model.ir_version)
    lower(model, plugins)
    return model


def steps(vocab):
    """Two sequences: their prompts in one step, then two steps of decoding."""
    pages = torch.tensor([[3, 5], [1, 8]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    for counts, before in (((17, 3), (0, 0)), ((1, 1), (17, 3)), ((1, 1), (18, 4))):
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


def empty_pools(model):
    """Of NaN, or of 99 where there is none."""
    pools = {value.name: value for value in model.graph.inputs if "pages." in value.name}
    return {name: torch.full((NUM_PAGES, PAGE, *(int(d) for d in value.shape[2:])),
                             99 if value.dtype == ir.DataType.INT8 else torch.nan, dtype=TORCH_DTYPES[int(value.dtype)])
            for name, value in pools.items()}  # fmt: skip


class HostGpu:
    """Kernels run in Triton's interpreter on the memory of the host."""

    def __init__(self, kernels):
        self._kernels, self._memory = kernels, []

    def allocate(self, num_bytes, what):
        self._memory.append(np.full(max(16, num_bytes), 0xFF, np.uint8))
        return self._memory[-1].ctypes.data

    def fill(self, address, num_bytes, byte, stream):
        ctypes.memset(address, byte, num_bytes)

    def stream(self):
        return 1

    def synchronise(self, stream):
        pass

    def launcher(self, found, saved, folder, monkeypatch):
        """Of these kernels instead of cubins."""
        used = {x.cubin for k in saved.kernels.values() for part in k.launches.values() for x in part}
        functions = {number: self._function(self._kernels[number]) for number in used}
        monkeypatch.setattr("ingot.plugins.tensorrt.launcher._load", lambda *_: functions)
        return Launcher(self, folder, found.plan, saved)

    def _function(self, kernel):
        def launch(grid, stream, arguments, *, apart=False):
            types = [kind for _, kind in kernel.signature]
            values = [_at(a, kind) if isinstance(a, gpus.Address) else a
                      for a, kind in zip(arguments, types, strict=True)]  # fmt: skip
            jit.launch_kernel(kernel, grid, values)

        return SimpleNamespace(launch=launch)


def _at(address, kind):
    """A tensor that begins at the address; the interpreter asks for no more."""
    buffer = (ctypes.c_uint8 * 16).from_address(address.value)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(jit.ELEMENTS[kind])


def without_cubins(monkeypatch):
    """Plans have cubins that hold nothing; returns the planners made, which have the kernels that they stand for."""
    made = []

    def compile_all(sources, capability):
        return {source: Cubin(b"\x7fELF", f"k{i}", 0, source.num_warps, True) for i, source in enumerate(sources)}

    monkeypatch.setattr(tactics, "compile_all", compile_all)
    monkeypatch.setattr(plugin_plan, "PluginPlanner", spy := type("Spy", (plugin_plan.PluginPlanner,), {}))
    monkeypatch.setattr(spy, "__post_init__", lambda self: (made.append(self), super(spy, self).__post_init__())[1])
    return made


def plan_of(model, device, folder):
    """The plan of a lowered graph's plugins, and what is saved of it."""
    found = plugin_plan.plan_plugins(model.graph, SIZES, device, PAGE, LENGTH, folder)
    saved = Plugins("m", "1", device.capability, ((0, 1, 2),), found.page_columns, found.kernels)
    saved.save(folder)
    return found, Plugins.open(folder)


class Enqueued:
    """The interpreter's nodes of domain ingot by the plugin's `enqueue`, each held to its definition.

    run: calls its argument with a stream, in whatever way is tested. ran: how often each op was. real: rows of a step
    that are not padding, by how many there are with it.
    """

    def __init__(self, found, launcher, run=lambda enqueue: enqueue(1)):
        self._found, self._run, self.ran, self.real = found, run, {}, {}
        self._plugins = {node: adapter.plugin_class()(node, 0, launcher) for node in found.nodes.values()}
        self.binders = {op: self._binder(op) for op in {node.op for node in self._plugins}}

    def _binder(self, op):
        return lambda attributes, constants: lambda *inputs: self._enqueue(op, attributes, inputs)

    def _enqueue(self, op, attributes, inputs):
        present = {i: x.contiguous() for i, x in enumerate(inputs) if x is not None}
        shapes = [list(x.shape) for x in present.values()]
        key = shape_key(shape for i, shape in zip(present, shapes, strict=True) if not self._pool(op, i))
        node = next(  # layers that are alike share one
            node for node in self._plugins
            if (node.op, node.inputs) == (op, tuple(present)) and key in self._found.kernels[node.kernels].launches
            and all(attributes[name] == node.attributes[name] for name in attributes if name != "layer")
        )  # fmt: skip
        copies = [None if x is None else x.cpu().clone() for x in inputs]
        expected = OPS[op].reference(*copies, **attributes)
        device = inputs[0].device
        size = self._found.kernels[node.kernels].workspace + 16
        workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=device)
        types = [TORCH_DTYPES[each] for each in output_types(node)]
        outputs = [torch.full(sizes, 99 if dtype is torch.int8 else torch.nan, dtype=dtype).to(device)
                   for sizes, dtype in zip(output_shapes(node, shapes), types, strict=True)]  # fmt: skip
        descriptions = [SimpleNamespace(dims=shape) for shape in shapes]
        pointers = [x.data_ptr() for x in present.values()], [y.data_ptr() for y in outputs]
        self._run(lambda stream: self._plugins[node].enqueue(descriptions, [], *pointers, workspace.data_ptr(), stream))
        own = outputs[: node.num_outputs]
        for y, wanted in zip(own, expected if isinstance(expected, tuple) else (expected,), strict=True):
            rows = self.real[len(y)]
            same(y[:rows].cpu(), wanted[:rows], op)
        for place in node.pools:  # but for the page that padding is written to
            index = node.inputs[place]
            same(inputs[index][1:].cpu(), copies[index][1:], f"{op}: {OPS[op].schema.inputs[index].name}")
        self.ran[op] = self.ran.get(op, 0) + 1
        return tuple(own) if len(own) > 1 else own[0]

    @staticmethod
    def _pool(op, index):
        return OPS[op].schema.inputs[index].name in ("k_pages", "v_pages")


def same(y, wanted, what):
    """8-bit numbers may be a neighbour, now and then, where what was rounded differs in its last bits."""
    if y.dtype in EIGHT_BITS:
        off = (y.float() - wanted.float()).abs()
        known = ~wanted.float().isnan()
        assert torch.equal(y.float().isnan(), ~known), what
        assert not (off[known] > wanted.float()[known].abs() * 0.13 + 1.01).any(), what
        assert (off[known] > 0).float().mean() < 0.02, what
        return
    bound = TOLERANCE[y.dtype]
    torch.testing.assert_close(y, wanted, rtol=bound, atol=bound * max(1.0, float(wanted.abs().nan_to_num().max())),
                               equal_nan=True, msg=lambda m: f"{what}: {m}")  # fmt: skip


def run_steps(whole, lowered_model, enqueued, found, device="cpu"):
    """Prompts in the bucket for any step, then decoding in the one for short contexts and in the other: gives the
    logits, and those of the graph and weights `whole` by its definition."""
    model, given = whole
    reference, vocab = Program(model, given), int(model.graph.outputs[0].shape[1])
    program = Program(lowered_model, weights_of(lowered_model, given, device), enqueued.binders)
    theirs = empty_pools(model)
    ours = {name: pool.clone().to(device) for name, pool in theirs.items()}
    for bucket, inputs in zip((2, 0, 1), steps(vocab), strict=True):
        sizes = found.plan.buckets[bucket]
        enqueued.real = {sizes.rows: len(inputs[step.LOGIT_ROWS]), sizes.tokens: len(inputs[step.TOKENS])}
        expected = reference({**inputs, **theirs})[step.LOGITS]
        padding = padded(inputs, sizes, found.page_columns[bucket])
        logits = program({**{name: x.to(device) for name, x in padding.items()}, **ours})[step.LOGITS]
        yield logits[: len(expected)].cpu(), expected
