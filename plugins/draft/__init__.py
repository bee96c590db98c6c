"""`Draft`: the step tensors of a draft engine, made on the GPU from what the target has just sampled.

No ONNX op: it stands in the place of staging. `kernel.py` says what goes in and out; `reference.py` is the definition.
"""

from .reference import first_step, next_step, path_step

__all__ = ["first_step", "next_step", "path_step"]
