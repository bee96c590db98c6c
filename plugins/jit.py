"""Launches a tactic through Triton's own compiler: for tests, benchmarks and the timing of tactics.

An engine holds cubins and needs no compiler; this needs one, and on a machine without a GPU Triton's interpreter
(TRITON_INTERPRET=1 before a kernel is imported).
"""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .cublas import choose, load_product
from .gpu import Address
from .tactic import Gemm, Kernel, Operand, Tactic

ELEMENTS = {
    "*fp32": torch.float32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*i32": torch.int32,
    "*i64": torch.int64,
    "*u8": torch.uint8,
    "*i8": torch.int8,
    "*fp8e4nv": torch.float8_e4m3fn,
}


def launch(
    tactic: Tactic,
    inputs: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor],
    workspace: torch.Tensor,
) -> None:
    """Runs the launches of `tactic` on the current stream; can be captured once the kernels are compiled.

    inputs: in the order of the op's schema, None where absent. workspace: uint8, at least `tactic.workspace` bytes.
    """
    zeros = _zeros(workspace.device, tactic.zeros)
    for each in tactic.launches:
        arguments: list[Any] = []
        kinds = (
            ["*u8"] * len(each.arguments)
            if isinstance(each.kernel, Gemm)
            else [kind for _, kind in each.kernel.signature]
        )
        for argument, kind in zip(each.arguments, kinds, strict=True):
            if not isinstance(argument, Operand):
                arguments.append(argument)
            elif argument.kind in ("workspace", "zeros"):
                element = ELEMENTS[kind]
                rest = (workspace if argument.kind == "workspace" else zeros)[argument.index :]
                arguments.append(rest[: rest.numel() // element.itemsize * element.itemsize].view(element))
            else:
                operand = (inputs if argument.kind == "input" else outputs)[argument.index]
                assert operand is not None, f"{each.kernel} is given an absent input"
                if kind == "*u8" and operand.itemsize == 1:
                    operand = operand.view(torch.uint8)  # FP8 that a kernel reads as bits
                arguments.append(
                    operand.view(-1)[argument.offset // operand.itemsize :] if argument.offset else operand
                )
        launch_kernel(each.kernel, each.grid, arguments)


@cache
def _zeros(device: torch.device, num_bytes: int) -> torch.Tensor:
    """Made once: launches leave it as it is."""
    return torch.zeros(max(num_bytes, 16), dtype=torch.uint8, device=device)


def launch_kernel(kernel: Kernel | Gemm, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    """One kernel (or product) on `grid`; tensors and numbers in the order of its signature."""
    if isinstance(kernel, Gemm):
        pointers = [Address(argument.data_ptr()) for argument in arguments]
        load_product(choose(kernel)).launch(grid, torch.cuda.current_stream().cuda_stream, pointers)
        return
    module, name = kernel.function.split(":")
    function: Any = getattr(importlib.import_module(f".{module}", __package__), name)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    named = {name: value for (name, _), value in zip(kernel.signature, arguments, strict=True)}
    function[grid](**named, **dict(kernel.constants), **options)
