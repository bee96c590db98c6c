"""Definition of `ingot::RotaryPagedAttention` in torch: the composition of the two ops that it stands for."""

from typing import Any

import torch

from ..paged_attention.reference import paged_attention
from ..rope.reference import rope


def rotary_paged_attention(
    x: torch.Tensor, cos_sin: torch.Tensor, *step: Any, interleaved: int = 0, rotary_offset: int = 0, **attributes: Any
) -> torch.Tensor:
    """x [T, packed q|k|v], cos_sin [T, r], then PagedAttention's inputs from `slots` on -> [T, H*Dv]."""
    rotated = rope(
        x,
        cos_sin,
        num_heads=attributes["num_heads"] + attributes["num_kv_heads"],
        head_dim=attributes["head_dim"],
        interleaved=interleaved,
        rotary_offset=rotary_offset,
    )
    return paged_attention(rotated, None, None, *step, **attributes)
