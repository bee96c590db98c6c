"""The CPU kernels of `plugins/*/kernel.cpp`: compiled when an engine is built, loaded with ctypes when it runs.

The library lies in the engine directory, as a cubin would: running needs no compiler. Beside it stands what it was made
of: a CPU that lacks a feature the compiler was allowed to use, or kernel sources that changed since, mean torch's own
ops instead, with the reason, never a crash. The library has no OpenMP runtime of its own: a second one beside torch's
would spin against it, so its symbols are left open and resolve to the runtime that torch has loaded.
"""

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (loads the OpenMP runtime that the library is to share)

from .binder import Binder
from .native_binders import binders

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")
LIBRARY, RECORD = "kernels.so", "kernels.json"
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class NativeBuild:
    """A library that was compiled: where it is and how it was made."""

    library: Path
    compiler: str
    flags: tuple[str, ...]
    cpu_features: tuple[str, ...]  # those the compiler was allowed to use
    seconds: float

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the kernels."""
        return {"kernels": "native", "compiler": self.compiler, "flags": " ".join(self.flags), "seconds": self.seconds}


@dataclass(frozen=True)
class Kernels:
    """A loaded library: op name -> binder, for `Program(kernels=...)`."""

    library: Path
    binders: Mapping[str, Binder]


@dataclass(frozen=True)
class Unavailable:
    """Why there are no native kernels: torch's ops are used."""

    reason: str

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the kernels."""
        return {"kernels": "torch", "reason": self.reason}


def compile(folder: Path) -> NativeBuild | Unavailable:
    """Compiles the kernels into `folder` with $CXX, c++, g++ or clang++, for this machine's CPU."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "c++", "g++", "clang++"))), None)
    if compiler is None:
        return Unavailable("no C++ compiler was found ($CXX, c++, g++, clang++); install one and build again")
    folder.mkdir(parents=True, exist_ok=True)
    machine = ("-march=native",) if platform.system() == "Linux" else ()
    reason = ""
    for openmp in (("-fopenmp",), ()):  # without threads where the compiler has no OpenMP, or one torch does not share
        flags, start = (*FLAGS, *machine, *openmp), time.perf_counter()
        try:
            _build(compiler, flags, folder / LIBRARY)
            features = _features_used(compiler, flags)
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} failed: {(error.stderr or '').strip()[:300]}"
            continue
        build = NativeBuild(folder / LIBRARY, compiler, flags, features, round(time.perf_counter() - start, 2))
        record = {"compiler": compiler, "flags": flags, "cpu_features": features, "sources": _fingerprint()}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        loaded = load(folder)
        if isinstance(loaded, Kernels):
            return build
        reason = loaded.reason
    for name in (LIBRARY, RECORD):
        (folder / name).unlink(missing_ok=True)
    return Unavailable(reason)


def load(folder: Path) -> Kernels | Unavailable:
    """Opens the library that `compile` left in `folder`, if this machine can run it."""
    try:
        record = json.loads((folder / RECORD).read_text())
        needed, sources = set(record["cpu_features"]), record["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        return Unavailable(f"{folder} holds no compiled kernels; build the engine again where a C++ compiler is")
    if missing := sorted(needed - _cpu_features()):
        return Unavailable(f"the kernels need the CPU features {', '.join(missing)}; build the engine on this machine")
    if sources != _fingerprint():
        return Unavailable("the kernels were compiled from other sources than this ingot's; build the engine again")
    _share_openmp()
    try:
        library = ctypes.CDLL(str((folder / LIBRARY).resolve()))
        return Kernels(folder / LIBRARY, binders(library))
    except (OSError, AttributeError) as error:
        return Unavailable(f"the kernels could not be loaded ({error}); build the engine again")


def _sources() -> list[Path]:
    return sorted(PACKAGE.glob("*/kernel.cpp"))


def _fingerprint() -> str:
    """Hash of all kernel sources: binders and kernels share structs, so they must be of one version."""
    digest = hashlib.sha256()
    for path in (PACKAGE / "simd.h", *sorted(PACKAGE.glob("*/*.h")), *_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _build(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """One compiler per source, side by side, then one link without libraries.

    Raises:
        subprocess.CalledProcessError: the compiler or the linker failed; `stderr` says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        objects, running = [], []
        for source in _sources():
            objects.append(f"{scratch}/{source.parent.name}.o")
            command = [compiler, *flags, "-c", str(source), "-o", objects[-1]]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        messages = [process.communicate()[1] for process in running]
        for process, message in zip(running, messages, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, compiler, stderr=message)
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        link = [compiler, "-shared", *undefined, *objects, "-o", str(library)]
        subprocess.run(link, check=True, capture_output=True, text=True)


def _cpu_features() -> set[str]:
    """Instruction sets of this CPU as /proc/cpuinfo names them; elsewhere just the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {platform.machine()}
    found = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return {platform.machine(), *found.split(":", 1)[1].split()}


def _features_used(compiler: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    """The CPU features the compiler may use under `flags`, from its predefined macros (`__AVX512F__`: avx512f).

    On other architectures than x86 the macros have other names, and all features of this CPU are taken."""
    features = _cpu_features()
    if platform.machine() not in ("x86_64", "AMD64"):
        return tuple(sorted(features))
    dump = subprocess.run(
        [compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull], check=True, capture_output=True, text=True
    )
    macros = {line.split()[1].replace("_", "").lower() for line in dump.stdout.splitlines() if line.count(" ") > 1}
    also = {"pni": "sse3", "abm": "lzcnt"}  # names of /proc/cpuinfo that differ from the compiler's
    return tuple(sorted(f for f in features if also.get(f, f).replace("_", "") in macros or f == platform.machine()))


def _share_openmp() -> None:
    """Makes the OpenMP runtime that torch has loaded visible to the library, where it is not yet."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel") or not os.path.exists("/proc/self/maps"):
        return
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "/" in line}
    for path in sorted(loaded):
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
