"""What an engine holds, as plain data: the text behind `ingot inspect`, and its `--json`.

Operations per layer come from `model.onnx` itself, not from a record of the build. Nodes are in execution order, so
those after one attention up to the next are one layer's worth (the rest of layer i, the beginning of layer i + 1); what
the first and the last stretch together have beyond that is outside of the layers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from . import tensorrt
from .manifest import Manifest
from .plan import Plan
from .weights import GRAPH_FILE, load_graph


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest's facts, and the operations of the graph. Sizes are in bytes, times in seconds."""
    ops = [node.op_type for node in load_graph(folder).graph]
    return {
        "engine": str(folder),
        "format_version": manifest.format_version,
        "ingot_version": manifest.ingot_version,
        "model": asdict(manifest.model),
        "target": manifest.target,
        "target_info": manifest.target_info,
        "bytes": manifest.num_bytes,
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "kv_bytes_per_token": manifest.kv_bytes_per_token,
        "kv_layers": [asdict(layer) for layer in manifest.kv_layers],
        "ops": operations(ops),
        "tensorrt": tensorrt_layers(folder) if manifest.target == tensorrt.FOLDER else None,
        "quantisation": manifest.quantisation,
        "hidden_states": list(manifest.hidden_states),
        "head": asdict(manifest.head) if manifest.head else None,
        "build": asdict(manifest.build),
    }


def operations(op_types: Sequence[str], boundary: str = "PagedAttention") -> dict[str, Any]:
    """`{"graph": file, "total": n, "layers": [{"first", "last", "ops": {op: count}}], "outside": {op: count}}`.

    Layers with the same operations are one entry. With fewer than two layers everything counts as outside.
    """
    ends = [i for i, op in enumerate(op_types) if op == boundary]
    periods = [Counter(op_types[a + 1 : b + 1]) for a, b in zip(ends, ends[1:], strict=False)]
    if not periods:
        return {"graph": GRAPH_FILE, "total": len(op_types), "layers": [], "outside": dict(Counter(op_types))}
    # The first layer begins in the first stretch and the last one ends in the tail: together they hold one period more
    edges = Counter(op_types[: ends[0] + 1]) + Counter(op_types[ends[-1] + 1 :])
    layers, first = [], 0
    for _, group in groupby([*periods, periods[-1]], key=lambda ops: sorted(ops.items())):
        same = list(group)
        layers.append({"first": first, "last": first + len(same) - 1, "ops": dict(same[0])})
        first += len(same)
    return {
        "graph": GRAPH_FILE,
        "total": len(op_types),
        "layers": layers,
        "outside": dict(edges - periods[-1]),
    }


STORED = "FP8", "Int8", "Int4"  # as TensorRT calls them


def tensorrt_layers(folder: Path) -> dict[str, Any]:
    """What TensorRT made of the graph: bytes of its plan, of ingot's cubins and of the plugins' workspace, and for each
    optimisation profile the most tokens of a step, its layers by type, its plugins by op, and how many of the others
    read numbers in fewer bits, by type (of an older engine: none are known)."""
    home = folder / tensorrt.FOLDER
    plan, plugins = Plan.open(home), tensorrt.Plugins.open(home)
    layers = json.loads((home / tensorrt.LAYERS_FILE).read_text(encoding="utf-8"))
    profiles = []
    for i, buckets in enumerate(plugins.profiles):
        own = [layer for layer in layers if layer["profile"] == i]
        profiles.append({
            "decoding": plan.buckets[buckets[0]].max_query == 1,
            "tokens": max(plan.buckets[bucket].tokens for bucket in buckets),
            "layers": dict(Counter(layer["type"] for layer in own).most_common()),
            "plugins": dict(Counter(layer["plugin"] for layer in own if "plugin" in layer)),
            "stored": dict(Counter(
                kind for layer in own if "plugin" not in layer for kind in layer.get("reads", ()) if kind in STORED
            )),
        })  # fmt: skip
    return {
        "plan_bytes": (home / tensorrt.ENGINE_FILE).stat().st_size,
        "cubin_bytes": sum(path.stat().st_size for path in home.glob("cubins/*")),
        "workspace_bytes": max((kernels.workspace for kernels in plugins.kernels.values()), default=0),
        "profiles": profiles,
    }
