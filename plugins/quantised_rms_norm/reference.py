"""Definition of `ingot::QuantisedRMSNorm` in torch: the composition of the two ops that it stands for."""

import torch

from ..quantise_tokens.reference import quantise_tokens
from ..rms_norm.reference import rms_norm


def quantised_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    dtype: int,
    group: int = 0,
    epsilon: float,
    weight_offset: float = 0.0,
    fp32_multiply: int = 0,
) -> tuple[torch.Tensor, ...]:
    """x [T, D], weight [D], residual [T, D] -> values [T, D], scale [T, G]; with a residual also x + residual."""
    options = {"epsilon": epsilon, "weight_offset": weight_offset, "fp32_multiply": fp32_multiply}
    found = rms_norm(x, weight, residual, **options)  # type: ignore[arg-type]
    y, *total = found if isinstance(found, tuple) else (found,)
    return (*quantise_tokens(y, dtype=dtype, group=group), *total)
