"""Definition of `ingot::GatedQuantisedLinear` in torch: the composition of the ops that it stands for."""

import torch

from ..gated_activation.reference import gated_activation
from ..quantise_tokens.reference import quantise_tokens
from ..quantised_linear.reference import quantised_linear


def gated_quantised_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    dtype: int,
    activation: str,
    group: int = 0,
    x_group: int = 0,
    y_dtype: int = 0,
    y_group: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [T, K], weight [2*I, K] (gates, then ups) -> act(gate) * up [T, I]; with y_dtype (values [T, I], scale)."""
    product = quantised_linear(x, weight, scale, zero, x_scale, bias, dtype=dtype, group=group, x_group=x_group)
    y = gated_activation(product, activation=activation)
    return quantise_tokens(y, dtype=y_dtype, group=y_group) if y_dtype else y
