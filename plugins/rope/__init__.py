"""`ingot::Rope`: rotary position embedding on flat activations, packed or not."""

from .reference import rope
from .schema import SCHEMA

__all__ = ["SCHEMA", "rope"]
