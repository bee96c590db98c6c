"""A GPU that is none: the driver of fake_driver.py, whose memory is the host's, and Triton's interpreter for graphs.

So an engine for the cuda target is served as a whole where there is no GPU: executor, tables, kernels, pools.
"""

import json
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
import torch
from fake_driver import FakeDriver
from hand_made import llama_graph
from ingot.builder import BuildConfig
from ingot.builder.heads.build import HeadBuild
from ingot.builder.passes import optimise
from ingot.builder.record import kv_layers
from ingot.builder.targets.buckets import bucket_sizes
from ingot.builder.targets.fusion import FUSIONS, VERIFYING, fuse
from ingot.builder.targets.head_planner import HeadPlanner
from ingot.builder.targets.planner import Planner
from ingot.engines.manifest import BuildRecord, KVLayer, Manifest, ModelInfo
from ingot.engines.plan import FOLDER, Argument, Plan
from ingot.engines.sampling import MAX_BRANCHES, SAMPLED
from ingot.engines.step import KV_LEN, LOGIT_ROWS
from ingot.engines.weights import save_graph
from ingot.engines.writer import engine_directory
from ingot.plugins import gpu as gpus
from ingot.plugins import jit, tactics_of
from ingot.plugins.tactic import Device
from ingot.runtime.cuda import drafting, executor
from safetensors.torch import save_file

CONFIG = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
              rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4})  # fmt: skip
VOCAB, WIDE, LENGTH, PAGE = 80, 48, 128, 4
KERNELS = {}  # folder of a plan -> what its cubins would be compiled from


def random_weights(seed=0):
    """Of CONFIG, so large that answers wander."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 2 * shape[-1] ** -0.5

    weights = {"model.embed_tokens.weight": random(VOCAB, 32) * 3, "model.norm.weight": 1 + random(32)}
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
              "self_attn.o_proj": (32, 32), "mlp.gate_proj": (WIDE, 32), "mlp.up_proj": (WIDE, 32),
              "mlp.down_proj": (32, WIDE)}  # fmt: skip
    weights |= {f"model.layers.0.{name}.weight": random(*shape) for name, shape in shapes.items()}
    norms = ("input", "post_attention")
    return weights | {f"model.layers.0.{name}_layernorm.weight": 1 + random(32) / 4 for name in norms}


def cast(out, weights, target, hidden_states=(), **sizes):
    """An engine of these weights in fp32; for the cuda target without cubins."""
    with engine_directory(out) as folder:
        graph = typed(llama_graph(CONFIG, weights, "float32", hidden_states))
        save_graph(graph, folder)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        if target == "cuda":
            KERNELS[out / FOLDER] = save_plan(graph, folder / FOLDER, **sizes)
        model = ModelInfo("tiny", "LlamaForCausalLM", "llama", 0, "float32", VOCAB, 1, 32, LENGTH, (1,), 0)
        layers, record = (KVLayer(1, 16, 16),), BuildRecord("2026-01-01T00:00:00Z", 0.0)
        Manifest(model, layers, target, {}, record, None, hidden_states, ingot_version="test").save(folder)
    return out


def write_target(out, weights):
    """The same as a checkpoint."""
    out.mkdir()
    more = dict(model_type="llama", architectures=["LlamaForCausalLM"], intermediate_size=WIDE, vocab_size=VOCAB,
                max_position_embeddings=LENGTH, tie_word_embeddings=True, eos_token_id=1)  # fmt: skip
    (out / "config.json").write_text(json.dumps(CONFIG | more))
    save_file(weights, out / "model.safetensors")
    return out


def export_head(checkpoint, target):
    """A head in fp32 and its graph."""
    head = HeadBuild(BuildConfig(str(checkpoint), "", dtype="float32", draft_for=str(target)))
    return head, head.finish(optimise(head.export()))


def cast_head(out, head, graph, **sizes):
    """Its engine for the cuda target, without cubins."""
    with engine_directory(out) as folder:
        graph = graph.clone()
        save_graph(graph, folder)
        KERNELS[out / FOLDER] = save_plan(graph, folder / FOLDER, head.info(), **sizes)
        record = BuildRecord("2026-01-01T00:00:00Z", 0.0)
        Manifest(head.model_info(graph), kv_layers(graph), "cuda", {}, record, head=head.info()).save(folder)
    return out


def typed(model):
    """The same with what the planner goes by: the dimensions of step tensors, and a type for each value."""
    for value in model.graph.inputs:
        dimension = {KV_LEN: "S", LOGIT_ROWS: "R"}.get(value.name)
        value.shape = ir.Shape((dimension,)) if dimension else value.shape
    for node in model.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs[0].shape = ir.Shape(("R", VOCAB))
    for value in model.graph.outputs[1:]:
        value.shape = ir.Shape(("T", CONFIG["hidden_size"]))
    return model


def quick(site):
    """The tactic that the interpreter runs fastest: the one of fewest programs."""
    return min(tactics_of(site.op)(site), key=lambda t: sum(math.prod(launch.grid) for launch in t.launches))


def save_plan(graph, folder, head=None, max_num_seqs=3, max_num_batched_tokens=16, max_draft_tokens=3):
    """Writes the plan and returns its kernels."""
    planner = (partial(HeadPlanner, head=head) if head else Planner)(
        fuse(graph.graph, VERIFYING if max_draft_tokens else FUSIONS),
        Device(90, 4),
        PAGE,
        LENGTH // PAGE,
        max_num_seqs,
        quick,
        max_draft_tokens=max_draft_tokens,
    )
    sizes = bucket_sizes(max_num_seqs, max_num_batched_tokens, LENGTH, max_draft_tokens)
    buckets = tuple(planner.plan(each) for each in sizes)
    folder.mkdir()
    Plan(
        90,
        planner.vocab_size,
        PAGE,
        planner.max_pages,
        planner.logits_dtype,
        planner.nodes,
        (),
        buckets,
        (),
        planner.zeros,
    ).save(folder)
    return list(planner.kernels)


class InterpretedGraphs:
    """`Graphs`, each launch interpreted. replays: (bucket, parts) of each that was asked for."""

    replays: list = []

    def __init__(self, gpu, plan, folder, weights, buffers, arena, stream):
        self._driver, self._plan, self._arena = gpu._cuda, plan, arena
        self._addresses, self._kernels = {"weight": weights, "input": buffers}, KERNELS[folder]

    def capture(self, bucket, *parts):
        lacking = [part for part in parts if part not in self._plan.buckets[bucket].parts]
        assert not lacking, (bucket, lacking)

    def replay(self, bucket, *parts):
        self.replays.append((self._plan.buckets[bucket], parts))
        for part in parts:
            for launch in self._plan.buckets[bucket].parts[part]:
                kernel = self._kernels[launch.cubin]
                kinds = [kind for _, kind in kernel.signature]
                values = [self._value(a, kind) for a, kind in zip(launch.arguments, kinds, strict=True)]
                jit.launch_kernel(kernel, launch.grid, values)

    def _value(self, argument, kind):
        if not isinstance(argument, Argument):
            return argument
        start = self._arena if argument.kind == "arena" else self._addresses[argument.kind][argument.name]
        address, element = start + argument.offset, jit.ELEMENTS[kind]
        base = max(at for at in self._driver.memory if at <= address)
        rest = self._driver.memory[base][address - base :]
        assert len(rest), "an address of no allocation"
        rest = rest[: len(rest) // element.itemsize * element.itemsize]
        return torch.from_numpy(rest).view(element)


class IdleGraphs(InterpretedGraphs):
    """Computes nothing but random tokens; all that launches are given must be there."""

    def replay(self, bucket, *parts):
        self.capture(bucket, *parts)
        for part in parts:
            for launch in self._plan.buckets[bucket].parts[part]:
                for argument, (_, kind) in zip(launch.arguments, self._kernels[launch.cubin].signature, strict=True):
                    self._value(argument, kind)
        buffers = {
            name: self._driver.memory[self._addresses["input"][name]] for name in (SAMPLED, "top_ids", "top_logprobs")
        }
        tokens = buffers[SAMPLED].view(np.int32)
        tokens[:] = np.random.default_rng(bucket).integers(2, 6, len(tokens))
        best = buffers["top_ids"].view(np.int32)
        best[:] = 2 + np.arange(len(best)) % MAX_BRANCHES
        buffers["top_logprobs"].view(np.float32)[:] = -1.0 - best


@contextmanager
def interpreted_gpu(graphs=InterpretedGraphs):
    """Engines for the cuda target are served by the interpreter; yields the list of what was replayed."""
    driver = FakeDriver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpus, "_driver", lambda: driver)
        patch.setattr(executor, "Graphs", graphs)
        patch.setattr(drafting, "Graphs", graphs)
        patch.setattr(executor, "MEASURING", 0.0)
        patch.setattr(InterpretedGraphs, "replays", [])
        # what kernels must not rely on: memory that is zero
        patch.setattr(FakeDriver, "_cuMemAlloc", _poisoned)
        yield InterpretedGraphs.replays


def _poisoned(driver, num_bytes):
    memory = np.full(num_bytes + 64, 0xFF, np.uint8)[:num_bytes]
    driver.memory[memory.ctypes.data] = memory
    driver.used += num_bytes
    return memory.ctypes.data
