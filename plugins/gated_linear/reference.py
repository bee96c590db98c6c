"""Definition of `ingot::GatedLinear` in torch: the composition of the two ops that it stands for."""

import torch

from ..gated_activation.reference import gated_activation
from ..linear.reference import linear


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str
) -> torch.Tensor:
    """x [T, K], weight [2*I, K] (gates, then ups), bias [2*I] -> act(gate) * up [T, I]."""
    return gated_activation(linear(x, weight, bias), activation=activation)
