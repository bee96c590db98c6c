"""Definition of `ingot::QuantisedLinear` in torch."""

import torch
import torch.nn.functional as F

from ..dtypes import TORCH_DTYPES


def quantised_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    dtype: int,
    group: int = 0,
    x_group: int = 0,
) -> torch.Tensor:
    """x [T, K], weight [N, K] (int4 as int8), scale [N] or [N, G] -> [T, N] in `dtype`."""
    numbers = weight.float()
    if zero is not None:
        numbers = numbers - spread(zero.float(), weight, group)
    numbers = numbers * spread(scale, weight, group)
    values = x.float() if x_scale is None else x.float() * spread(x_scale, x, x_group)
    return F.linear(values, numbers, None if bias is None else bias.float()).to(TORCH_DTYPES[dtype])


def spread(scale: torch.Tensor, x: torch.Tensor, group: int) -> torch.Tensor:
    """A scale of rows or of groups of columns, so that it multiplies x [R, K]."""
    if group:
        return scale.repeat_interleave(group, 1)[:, : x.shape[1]]
    return scale if scale.numel() == 1 else scale.reshape(-1, 1)
