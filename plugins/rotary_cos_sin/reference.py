"""Definition of `ingot::RotaryCosSin` in torch."""

import torch

from ..dtypes import TORCH_DTYPES


def rotary_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, *, dtype: int, attention_scaling: float = 1.0
) -> torch.Tensor:
    """positions [T], inv_freq [r/2] -> [T, r]: cosines, then sines, in the ONNX data type `dtype`."""
    angles = positions.float().unsqueeze(-1) * inv_freq.float()  # [T, r/2]
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    return (cos_sin * attention_scaling).to(TORCH_DTYPES[dtype])
