"""Graphs and engines for TensorRT, without the parts of a build that are tested elsewhere (self-check, gate)."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from ingot import BuildConfig
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.passes import optimise
from ingot.builder.quantise import quantise
from ingot.builder.record import kv_layers, model_info
from ingot.builder.targets import audience_of, target_of
from ingot.calibration.scales import Scales
from ingot.engines.manifest import BuildRecord, Manifest
from ingot.engines.tensorrt import FOLDER, LAYERS_FILE, Plugins
from ingot.engines.weights import load_graph, save_graph

SIZES = dict(target="tensorrt", max_num_seqs=1, max_num_batched_tokens=16)


def write_graph(checkpoint, folder, dtype="bfloat16"):
    """`model.onnx` and weights of a checkpoint in `folder`; returns the ModelInfo."""
    opened = Checkpoint.open(str(checkpoint))
    graph = optimise(export(opened, dtype))
    save_graph(graph, folder)
    return model_info(str(checkpoint), opened, graph, dtype)


def quantised(folder, out, recipe):
    """The graph of `folder` with its weights rounded to the nearest as the recipe says, in `out`."""
    graph = load_graph(folder)
    quantise(graph, recipe, Scales())
    save_graph(graph, out)


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
        types=Counter(layer["type"] for layer in layers),
    )  # fmt: skip
