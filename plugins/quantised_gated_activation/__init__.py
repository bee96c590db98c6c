"""`ingot::QuantisedGatedActivation`: act(gate) * up, left in 8 bits; made by the cuda target's fusion."""

from .reference import quantised_gated_activation
from .schema import SCHEMA

__all__ = ["SCHEMA", "quantised_gated_activation"]
