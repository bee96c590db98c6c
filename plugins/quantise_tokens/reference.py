"""Definition of `ingot::QuantiseTokens` in torch."""

import torch
import torch.nn.functional as F

from ..dtypes import TORCH_DTYPES

REACH = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}  # of a scale: half the span of the stored numbers
LIMITS = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantise_tokens(x: torch.Tensor, *, dtype: int, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> values [T, K] in `dtype`, scale [T, G] fp32; in fp32 throughout."""
    stored, columns = TORCH_DTYPES[dtype], x.shape[1]
    width = group or max(columns, 1)
    blocks = F.pad(x.float(), (0, -columns % width)).unflatten(1, (-1, width))  # [T, G, width]
    reach = blocks.abs().amax(-1)
    scale = (reach / REACH[stored]).clamp(min=SMALLEST_SCALE).where(reach > 0, torch.ones_like(reach))
    values = (blocks / scale[:, :, None]).flatten(1)[:, :columns]
    return round_to(values, stored), scale


def round_to(x: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The nearest stored numbers (ties to even), saturated: what QuantizeLinear does after the division."""
    x = x.clamp(*LIMITS[stored])  # first: torch makes NaN of what is beyond 448
    return (x.round() if stored is torch.int8 else x).to(stored)
