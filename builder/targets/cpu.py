"""The cpu target: the graph runs as it is; native kernels are compiled ahead of time where there is a C++ compiler.

Without a compiler the engine is complete all the same: the plain-torch ops serve, slower, and the manifest says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...plugins import native


def compile(graph: ir.Model, folder: Path) -> dict[str, Any]:
    """Compile the native kernels into `folder/cpu`; returns what the manifest says about them."""
    return native.compile(folder / "cpu").describe()
