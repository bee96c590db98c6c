"""Graphs and engines for TensorRT, without the parts of a build that are tested elsewhere (self-check, gate)."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from families import FAMILIES
from hand_made import DEMO
from ingot import BuildConfig
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.kv_cache import quantise_pools
from ingot.builder.passes import optimise
from ingot.builder.quantise import choose, quantise
from ingot.builder.record import kv_layers, model_info
from ingot.builder.targets import audience_of, target_of
from ingot.calibration.recipe import Recipe, parse
from ingot.calibration.scales import Scales
from ingot.engines.manifest import BuildRecord, Manifest
from ingot.engines.tensorrt import FOLDER, LAYERS_FILE, Plugins
from ingot.engines.weights import load_graph, save_graph
from transformers import AutoModelForCausalLM

SIZES = dict(target="tensorrt", max_num_seqs=1, max_num_batched_tokens=16)


def write_graph(checkpoint, folder, dtype="bfloat16"):
    """`model.onnx` and weights of a checkpoint in `folder`; returns the ModelInfo."""
    opened = Checkpoint.open(str(checkpoint))
    graph = optimise(export(opened, dtype))
    save_graph(graph, folder)
    return model_info(str(checkpoint), opened, graph, dtype)


def recipe_of(weight, activation="", symmetric=True, match="*"):
    """A recipe that rounds weights so; `activation`: what products read, too."""
    rule = f"{{match: '{match}', method: rtn, format: {{{weight}, symmetric: {str(symmetric).lower()}}}"
    rule += f", activation: {{{activation}}}}}" if activation else "}"
    return parse(f"{{perplexity: 1, rules: [{rule}]}}", "test", "test")


def in_fewer_bits(model, recipe=None, pages="", per_head=False):
    """Quantises in place: weights by `recipe`, rounded to the nearest, and KV pages, with scales that are no one's."""
    if recipe:
        scales = {each.name: torch.tensor(0.05) for each in choose(model, recipe)}
        quantise(model, recipe, Scales(activations=scales))
    if pages:
        pools = {v.name: int(v.shape[2]) if per_head else 1 for v in model.graph.inputs if "pages." in v.name}
        own = torch.Generator().manual_seed(0)
        scales = {name: 0.02 + 0.01 * torch.rand(size, generator=own) for name, size in pools.items()}
        quantise_pools(model, pages, scales)


def quantised(folder, out, recipe, pages=""):
    """The graph of `folder` in fewer bits, in `out`."""
    graph = load_graph(folder)
    in_fewer_bits(graph, recipe, pages)
    save_graph(graph, out)


# -- the matrix: every model in every precision for every architecture -------------------------------------------------

MODELS = "pycoder-14m", "qwen3", "gemma3", "mistral"
PRECISIONS = "bf16", "fp8", "int4"
CAPABILITIES = 89, 120


def checkpoint_of(name, folder):
    """The demo's, or one of two layers with random weights in `folder`."""
    if name not in FAMILIES:
        return DEMO / name
    torch.manual_seed(0)
    config = FAMILIES[name]()
    config.num_hidden_layers = 2
    if name == "gemma3":
        config.layer_types = ["sliding_attention", "full_attention"]
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def in_precision(name, precision, folder, out):
    """The graph of `folder` in `out`: fp8 has FP8 pages, and scales for each token or, where a layer slides, all."""
    out.mkdir()
    if precision == "bf16":
        shutil.copytree(folder, out, dirs_exist_ok=True)
    elif precision == "fp8":
        quantised(folder, out, Recipe.open("fp8-static" if name in ("gemma3", "mistral") else "fp8"), "fp8_e4m3")
    else:
        quantised(folder, out, recipe_of("dtype: int4, group: 32") if name in FAMILIES else Recipe.open("int4-rtn"))


def compile_for(folder, model, capability, **options):
    """Builds for TensorRT in place; returns what there is to check, with TensorRT's own account of its layers."""
    notes, progress = [], []
    config = BuildConfig("", str(folder), **SIZES | dict(gpu_arch=capability) | options)
    audience = audience_of(lambda done, total: progress.append((done, total)), notes.append)
    graph = load_graph(folder)
    with target_of("tensorrt").begin(config, audience) as compile:
        info = compile(graph, model, folder)
    record = BuildRecord("2026-01-01T00:00:00Z", 0.0)
    manifest = Manifest(model, kv_layers(graph), "tensorrt", info, record).save(folder)
    layers = json.loads((folder / FOLDER / LAYERS_FILE).read_text())
    return SimpleNamespace(
        folder=Path(folder), info=info, notes=notes, progress=progress, layers=layers, manifest=manifest, graph=graph,
        plugins=Plugins.open(folder / FOLDER),
        attention=[layer for layer in layers if layer.get("plugin", "").endswith("PagedAttention")],
        fused=[layer for layer in layers if len(layer["nodes"]) > 1],
        # products of what is stored: nothing is taken back before them
        products={kind: [layer for layer in layers
                         if kind in layer["reads"] and any("Gemm" in node for node in layer["nodes"])]
                  for kind in ("FP8", "Int8", "Int4")},
        types=Counter(layer["type"] for layer in layers),
    )  # fmt: skip
