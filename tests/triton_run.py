"""Runs a tactic through Triton itself: on the GPU where there is one, in Triton's interpreter otherwise.

conftest.py asks for the interpreter before any kernel is imported. The runtime launches cubins instead; that both do
the same is a test of its own.
"""

import importlib
import math

import torch
from ingot.plugins.tactic import Operand, Tactic, Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def described(tensor):
    """The `Tensor` of a torch tensor, None for None."""
    return None if tensor is None else Tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def poisoned(shape, dtype):
    """A tensor of NaN, or of a large number where there is no NaN."""
    dtype = getattr(torch, dtype)
    return torch.full(shape, math.nan if dtype.is_floating_point else 2**30, dtype=dtype, device=DEVICE)


def run_tactic(tactic: Tactic, inputs, outputs):
    """Launches `tactic` on torch tensors (`inputs` may hold None); returns the outputs, made of poison first.

    outputs: `Tensor` each. Pools that an op updates in place are inputs.
    """
    results = [poisoned(out.shape, out.dtype) for out in outputs]
    workspace = torch.full((max(tactic.workspace, 16),), 0x7F, dtype=torch.uint8, device=DEVICE)  # NaN in any float
    for launch in tactic.launches:
        module, name = launch.kernel.function.split(":")
        function = getattr(importlib.import_module(f"ingot.plugins.{module}"), name)
        arguments = []
        for argument, (_, kind) in zip(launch.arguments, launch.kernel.signature, strict=True):
            if isinstance(argument, Operand):
                if argument.kind == "workspace":
                    argument = _typed(workspace[argument.index :], kind)
                else:
                    argument = (inputs if argument.kind == "input" else results)[argument.index]
                    assert argument is not None, f"{launch.kernel.function} is given an absent input"
            arguments.append(argument)
        options = dict(num_warps=launch.kernel.num_warps, num_stages=launch.kernel.num_stages)
        function[launch.grid](*arguments, **dict(launch.kernel.constants), **options)
    return results


def _typed(workspace, kind):
    dtype = {"*fp32": torch.float32, "*i32": torch.int32, "*bf16": torch.bfloat16, "*fp16": torch.float16}[kind]
    return workspace[: len(workspace) // dtype.itemsize * dtype.itemsize].view(dtype)
