"""`ingot::PagedAttention`: KV write and causal attention over a paged pool, prefill and decode in one call."""

from .reference import paged_attention
from .schema import SCHEMA

__all__ = ["SCHEMA", "paged_attention"]
