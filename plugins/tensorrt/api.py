"""TensorRT's Python module, whichever is installed: `from . import api as trt`, then `trt.Builder(..)`.

`api.pyi` beside it declares what ingot uses of it, for the type checker; a test compares that with the names that the
bindings of each supported version have. The module is loaded when a name is first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ...engines.errors import EngineError
from ...engines.extras import pip_install
from .alias_library import load_alias

# full TensorRT first; `tensorrt_rtx_bindings` is how the wheels on PyPI call TensorRT for RTX
MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    return getattr(module(), name)


@cache
def module() -> ModuleType:
    """The module. INGOT_TENSORRT names one; without it the first of `MODULES` that is installed.

    Raises EngineError: none is installed, or its libraries cannot be loaded.
    """
    asked = os.environ.get("INGOT_TENSORRT")
    names = (asked,) if asked else MODULES
    failed = []
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
            if spec is None:
                continue
            _complete(Path(spec.origin or ""))
            found = importlib.import_module(name)
            if hasattr(found, "Builder"):
                return found
            failed.append(f"{name} has no Builder")
        except (ImportError, OSError, KeyError) as error:
            failed.append(f"{name}: {error}")
    why = "; ".join(failed) or f"none of the modules {', '.join(names)} is installed"
    raise EngineError(
        f"the tensorrt target needs TensorRT, and it cannot be loaded ({why}); install TensorRT for RTX with "
        f"{pip_install('tensorrt')}, or for a GPU of a data centre `pip install tensorrt`."
    )


def _complete(origin: Path) -> None:
    """Makes up for the name that the RTX wheel lacks."""
    folder = origin.parent.parent / "tensorrt_rtx_libs"
    alias = "libtensorrt_rtx.so"
    libraries = sorted(folder.glob(f"{alias}.[0-9]*"))
    if libraries and not (folder / alias).exists():
        load_alias(libraries[0], alias)
