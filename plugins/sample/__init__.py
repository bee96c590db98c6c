"""`Sample`: one token per row of logits, each by its own request's parameters.

No ONNX op: the runtime puts it behind the logits of a bucket. `kernel.py` says what goes in and out; `reference.py` is
the definition in torch.
"""

from .reference import adjusted, probabilities, sample

__all__ = ["adjusted", "probabilities", "sample"]
