"""`ingot::GatedActivation`: act(gate) * up on one packed activation."""

from .reference import gated_activation
from .schema import SCHEMA

__all__ = ["SCHEMA", "gated_activation"]
