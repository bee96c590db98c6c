"""Definition of `ingot::Linear` in torch."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]; accumulated in fp32, rounded once."""
    return F.linear(x, weight, bias)
