"""Triton kernels to cubins, ahead of time: no GPU, no driver, no torch is needed, so one machine builds for all.

A kernel is data (`plugins/tactic.py`), so equal kernels are compiled once. Compiling is mostly Python, so many kernels
are shared out over processes, each of which runs this module. Triton keeps what it compiled in its own cache on disk,
keyed by source, options and version; a build that compiles a kernel again takes milliseconds. Where that cannot be
written, as a container's home may not, there is one for as long as the build compiles.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engines import plan
from ...engines.errors import BuildError
from ...engines.extras import pip_install
from ...plugins import cublas, pdl
from ...plugins.tactic import Gemm, Kernel
from .sass import faults

CAPABILITIES = (80, 86, 89, 90, 100, 120)
BATCH = 8  # kernels that a process gets at a time: it takes a second to start


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel. Launched with the signature's arguments and two null pointers (Triton's scratch) behind them.

    shared: bytes of dynamic shared memory; above 48 KiB the function's limit must be raised before the first launch.
    pdl: it waits for the kernels before it by itself, so it may be launched before they are done (`plugins/pdl.py`).
    """

    data: bytes
    name: str
    shared: int
    num_warps: int
    pdl: bool


Source = Kernel | Gemm  # what a launch names
Binary = Cubin | plan.Gemm  # what it becomes


def compile_kernel(kernel: Kernel, capability: int) -> Cubin:
    """The cubin of `kernel` for compute capability `capability` (90: 9.0).

    Raises:
        BuildError: Triton is not installed, cannot compile the kernel (its own message in one line), makes wrong code
            of it (`sass.py`), or code that asks for more shared memory than a program has there.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise BuildError(
            f"the cuda target compiles with Triton ({error}); install it with {pip_install('cuda')}."
        ) from None
    from ...plugins.paged_attention.launches import shared_memory

    module, name = kernel.function.split(":")
    function: Any = getattr(importlib.import_module(f"...plugins.{module}", __package__), name)
    left_out = {parameter.name: parameter.default for parameter in function.params if parameter.has_default}
    constants = {name: value for name, value in left_out.items() if name not in dict(kernel.signature)}
    constants |= dict(kernel.constants) | {"PDL": capability >= pdl.OLDEST}
    signature = dict(kernel.signature) | dict.fromkeys(constants, "constexpr")
    order = {argument: index for index, argument in enumerate(function.arg_names)}
    aligned = {(order[argument],): [["tt.divisibility", 16]] for argument in kernel.divisible}
    try:
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton raises whatever its passes raise
        message = " ".join(str(error).split())[:300]
        raise BuildError(f"{kernel.function} does not compile for sm_{capability}: {message}") from error
    if "wgmma" in compiled.asm["ptx"] and (wrong := faults(compiled.asm["cubin"])):
        raise BuildError(f"ptxas makes wrong code of {kernel.function} for sm_{capability}: {wrong[0]}")
    meta, limit = compiled.metadata, shared_memory(capability)
    if meta.shared > limit:
        raise BuildError(
            f"{meta.name} needs {meta.shared} bytes of shared memory, a program on sm_{capability} has {limit}"
        )
    return Cubin(compiled.asm["cubin"], meta.name, meta.shared, meta.num_warps, constants["PDL"])


def compile_all(
    sources: Collection[Source], capability: int, on_done: Callable[[int, int], None] = lambda done, total: None
) -> dict[Source, Binary | BuildError]:
    """Each kernel, compiled, each product's algorithm, or what was wrong. `on_done(done, total)` counts kernels."""
    todo = [source for source in dict.fromkeys(sources) if isinstance(source, Kernel)]
    done = 0
    batches = [todo[i : i + BATCH] for i in range(0, len(todo), BATCH)]
    found: dict[Source, Binary | BuildError] = {
        source: _choose(source) for source in sources if isinstance(source, Gemm)
    }
    with triton_cache() as env, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        cubins_of = pool.map(lambda batch: _in_a_process(batch, capability, env), batches)
        for batch, cubins in zip(batches, cubins_of, strict=True):
            found |= dict(zip(batch, cubins, strict=True))
            done += len(batch)
            on_done(done, len(todo))
    return found


@contextmanager
def triton_cache() -> Iterator[Mapping[str, str]]:
    """What tells Triton where to keep what it compiles: nothing, or a folder for now where its own is read-only."""
    own = os.environ.get("TRITON_CACHE_DIR")
    folder = Path(own or Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache")).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="ingot-") as scratch:
        yield {"TRITON_CACHE_DIR": scratch}


def _choose(gemm: Gemm) -> plan.Gemm | BuildError:
    try:
        return cublas.choose(gemm)
    except BuildError as error:
        return error


def _in_a_process(kernels: list[Kernel], capability: int, cache: Mapping[str, str]) -> list[Cubin | BuildError]:
    """Not a multiprocessing pool: that would run the caller's main module again."""
    # a process that interprets kernels compiles none
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **cache}
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=pickle.dumps((kernels, capability)), capture_output=True, env=env)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        return [BuildError(f"the process that compiles kernels for sm_{capability} failed: {lines[-1]}")] * len(kernels)
    return pickle.loads(done.stdout)


def _compile_here(kernels: list[Kernel], capability: int) -> list[Cubin | BuildError]:
    found: list[Cubin | BuildError] = []
    for kernel in kernels:
        try:
            found.append(compile_kernel(kernel, capability))
        except BuildError as error:
            found.append(BuildError(str(error)))  # without the traceback's objects, which may not pickle
    return found


if __name__ == "__main__":
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # what a kernel's compiler prints is not our answer
    # classes of this module under its own name, not __main__
    here = importlib.import_module("ingot.builder.targets.cubin")
    out.write(pickle.dumps(here._compile_here(*pickle.load(sys.stdin.buffer))))
