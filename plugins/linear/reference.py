"""Definition of `ingot::Linear` in torch."""

import torch
import torch.nn.functional as F

from ..few_shapes import in_few_shapes


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]; accumulated in fp32, rounded once."""
    return in_few_shapes(lambda x: F.linear(x, weight, bias), x)
