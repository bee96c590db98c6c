"""The seam between a graph node and the code that computes it.

A binder sees a node once, when a `Program` is built: its attributes and its constant inputs, so that a kernel can pack
a weight or take its pointer there. It returns what runs every step, with the signature of the op's reference, or `None`
to decline the node. Inputs are never modified, except the KV pages; outputs are fresh tensors or views of inputs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

Attributes = Mapping[str, Any]
Constants = tuple[torch.Tensor | None, ...]
Run = Callable[..., torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]]  # a list is an ONNX sequence
Binder = Callable[[Attributes, Constants], Run | None]


def from_reference(reference: Run) -> Binder:
    """The binder of a plain function `reference(*inputs, **attributes)`."""

    def bind(attributes: Attributes, constants: Constants) -> Run:
        return partial(reference, **attributes)

    return bind
