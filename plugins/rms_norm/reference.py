"""Definition of `ingot::RMSNorm` in torch."""

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    epsilon: float,
    weight_offset: float = 0.0,
    fp32_multiply: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [T, n*D], weight [D], residual [T, n*D] -> y [T, n*D]; with a residual -> (y, x + residual)."""
    total = x if residual is None else x + residual
    h = total.float().unflatten(-1, (-1, weight.shape[0]))  # [T, n, D]
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    if weight_offset or fp32_multiply:
        y = (h * (weight.float() + weight_offset)).to(x.dtype)
    else:
        y = h.to(x.dtype) * weight
    y = y.flatten(-2)
    return y if residual is None else (y, total)
