"""The cpu target: native kernels are compiled ahead of time where there is a C++ compiler; the graph runs as it is.

Without a compiler the engine is complete all the same: the plain-torch ops serve, slower, and the manifest says why.
A graph with quantised weights is lowered into `cpu/model.onnx`, so that products read them as the file has them.
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

from ...engines.manifest import HeadInfo, ModelInfo
from ...engines.weights import load_graph, save_lowered
from ...plugins import native
from ..passes import drop_dead
from ..passes.graph import nodes
from ..passes.lowering import lower_quantised
from ..passes.verify import verify
from . import NOBODY, Audience, Compile

if TYPE_CHECKING:
    from .. import BuildConfig


@contextmanager
def begin(config: BuildConfig, audience: Audience = NOBODY) -> Iterator[Compile]:
    """The kernels are the same for every graph, so the C++ compiler runs beside the export, on another core."""
    with tempfile.TemporaryDirectory(prefix="ingot-") as scratch, ThreadPoolExecutor(1) as thread:
        kernels = Path(scratch) / "cpu"
        compiling = thread.submit(native.compile, kernels)

        def compile(graph: ir.Model, model: ModelInfo, folder: Path, head: HeadInfo | None = None) -> dict[str, Any]:
            """Put kernels, and the lowered graph if any, into `folder/cpu`; returns what the manifest says of them."""
            built = compiling.result()
            if isinstance(built, native.NativeBuild):
                (folder / "cpu").mkdir()
                for name in (native.LIBRARY, native.RECORD):
                    shutil.copy(kernels / name, folder / "cpu")
            else:
                audience.note(f"the engine has no native kernels, and will be slow: {' '.join(built.reason.split())}.")
            if nodes(graph, "DequantizeLinear"):
                save_lowered(_lowered(folder), folder / "cpu")
            return built.describe()

        yield compile


def _lowered(folder: Path) -> ir.Model:
    """The graph of the engine in `folder`, its weights where the file has them. BuildError if lowering spoils it."""
    model = load_graph(folder)
    lower_quantised(model)
    drop_dead(model)
    verify(model, lower_quantised.__name__)
    return model
