"""Runs a tactic on poisoned outputs: on the GPU where there is one, in Triton's interpreter otherwise.

conftest.py asks for the interpreter before any kernel is imported.
"""

import math
import random

import torch
from ingot.plugins import jit
from ingot.plugins.tactic import Tactic, Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def described(tensor):
    """The `Tensor` of a torch tensor, None for None."""
    return None if tensor is None else Tensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def poisoned(shape, dtype):
    """A tensor of NaN, or of a large number where there is no NaN."""
    dtype = getattr(torch, dtype)
    large = math.nan if dtype.is_floating_point else min(2**30, torch.iinfo(dtype).max)
    return torch.full(shape, large, dtype=dtype, device=DEVICE)


def run_tactic(tactic: Tactic, inputs, outputs):
    """Launches `tactic` on torch tensors (`inputs` may hold None); returns the outputs, made of poison first.

    outputs: `Tensor` each. Pools that an op updates in place are inputs.
    """
    results = [poisoned(out.shape, out.dtype) for out in outputs]
    workspace = torch.full((max(tactic.workspace, 16),), 0xFF, dtype=torch.uint8, device=DEVICE)  # NaN in any float
    jit.launch(tactic, inputs, results, workspace)
    return results


def some_of(found, num):
    """Some of the tactics, others each time: compiling all of them for every shape takes minutes."""
    return random.sample(found, min(num, len(found)))
