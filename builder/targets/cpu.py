"""The cpu target: the graph runs as it is, node by node, on the plain-torch ops of `plugins/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir


def compile(graph: ir.Model, folder: Path) -> dict[str, Any]:
    """Nothing is compiled for this target; returns what the manifest says about its kernels."""
    return {"kernels": "torch"}
