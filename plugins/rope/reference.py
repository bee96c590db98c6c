"""Definition of `ingot::Rope` in torch."""

import torch


def rope(
    x: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    num_heads: int,
    head_dim: int,
    interleaved: int = 0,
    rotary_offset: int = 0,
) -> torch.Tensor:
    """x [T, W], cos_sin [T, r] -> [T, W], the first `num_heads * head_dim` columns rotated per head."""
    width = cos_sin.shape[-1]
    cos, sin = cos_sin.unsqueeze(-2).chunk(2, -1)  # [T, 1, r/2]
    y = x.clone(memory_format=torch.contiguous_format)
    heads = y[..., : num_heads * head_dim].unflatten(-1, (num_heads, head_dim))
    rotated = heads[..., rotary_offset : rotary_offset + width]  # [T, H, r], a view of y
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
    return y
