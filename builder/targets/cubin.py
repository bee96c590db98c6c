"""Triton kernels to cubins, ahead of time: no GPU, no driver, no torch is needed, so one machine builds for all.

A kernel is data (`plugins/tactic.py`), so equal kernels are compiled once. Triton keeps what it compiled in its own
cache on disk, keyed by source, options and version; a build that compiles a kernel again takes milliseconds.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ...engines.errors import BuildError
from ...plugins.tactic import Kernel

CAPABILITIES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel. Launched with the signature's arguments and two null pointers (Triton's scratch) behind them.

    shared: bytes of dynamic shared memory; above 48 KiB the function's limit must be raised before the first launch.
    """

    data: bytes
    name: str
    shared: int
    num_warps: int


def compile_kernel(kernel: Kernel, capability: int) -> Cubin:
    """The cubin of `kernel` for compute capability `capability` (90: 9.0).

    Raises:
        BuildError: Triton is not installed, or cannot compile the kernel (its own message in one line).
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise BuildError(
            f"the cuda target compiles with Triton ({error}); install it with `pip install ingot[cuda]`"
        ) from None
    module, name = kernel.function.split(":")
    function: Any = getattr(importlib.import_module(f"...plugins.{module}", __package__), name)
    signature = dict(kernel.signature) | {name: "constexpr" for name, _ in kernel.constants}
    order = {argument: index for index, argument in enumerate(function.arg_names)}
    aligned = {(order[argument],): [["tt.divisibility", 16]] for argument in kernel.divisible}
    try:
        source = ASTSource(fn=function, signature=signature, constexprs=dict(kernel.constants), attrs=aligned)
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton raises whatever its passes raise
        message = " ".join(str(error).split())[:300]
        raise BuildError(f"{kernel.function} does not compile for sm_{capability}: {message}") from error
    meta = compiled.metadata
    return Cubin(compiled.asm["cubin"], meta.name, meta.shared, meta.num_warps)


def compile_all(kernels: set[Kernel], capability: int, threads: int = 4) -> dict[Kernel, Cubin]:
    """Each kernel once; ptxas runs in processes of its own, so threads compile side by side. Raises BuildError."""
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(kernels, pool.map(lambda kernel: compile_kernel(kernel, capability), kernels), strict=True))
