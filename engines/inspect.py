"""What an engine holds, as plain data: the text behind `ingot inspect`, and its `--json`.

Operations per layer come from `model.onnx` itself, not from a record of the build. Nodes are in execution order, so
those after one attention up to the next are one layer's worth (the rest of layer i, the beginning of layer i + 1); what
the first and the last stretch together have beyond that is outside of the layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from .manifest import Manifest
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
        "quantisation": manifest.quantisation,
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
