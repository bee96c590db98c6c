"""Definition of `ingot::QuantisedGatedActivation` in torch: the composition of the two ops that it stands for."""

import torch

from ..gated_activation.reference import gated_activation
from ..quantise_tokens.reference import quantise_tokens


def quantised_gated_activation(
    x: torch.Tensor, *, activation: str, dtype: int, group: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, 2*I] (gate, then up) -> values [T, I], scale [T, G]."""
    return quantise_tokens(gated_activation(x, activation=activation), dtype=dtype, group=group)
