"""`DraftHead`: the step tensors of a head, made on the GPU from what the target has just sampled.

No ONNX op: it stands in the place of staging, as `Draft` does. `kernel.py` says what goes in and out; `reference.py` is
the definition.
"""

from .reference import first_step, next_step

__all__ = ["first_step", "next_step"]
