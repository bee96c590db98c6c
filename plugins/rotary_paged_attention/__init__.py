"""`ingot::RotaryPagedAttention`: a packed Rope and its PagedAttention; made by the cuda target's fusion."""

from .reference import rotary_paged_attention
from .schema import SCHEMA

__all__ = ["SCHEMA", "rotary_paged_attention"]
