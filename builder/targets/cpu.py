"""The cpu target: the graph runs as it is; native kernels are compiled ahead of time where there is a C++ compiler.

Without a compiler the engine is complete all the same: the plain-torch ops serve, slower, and the manifest says why.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ...engines.manifest import ModelInfo
from ...plugins import native
from . import Compile

if TYPE_CHECKING:
    from .. import BuildConfig


@contextmanager
def begin(config: BuildConfig) -> Iterator[Compile]:
    """The kernels are the same for every graph, so the C++ compiler runs beside the export, on another core."""
    with tempfile.TemporaryDirectory(prefix="ingot-") as scratch, ThreadPoolExecutor(1) as thread:
        kernels = Path(scratch) / "cpu"
        compiling = thread.submit(native.compile, kernels)

        def compile(graph: ir.Model, model: ModelInfo, folder: Path) -> dict[str, Any]:
            """Put the native kernels into `folder/cpu`; returns what the manifest says about them."""
            info = compiling.result().describe()
            if (kernels / native.LIBRARY).exists():
                shutil.copytree(kernels, folder / "cpu")
            return info

        yield compile
