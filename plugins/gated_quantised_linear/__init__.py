"""`ingot::GatedQuantisedLinear`: act(gate) * up of one product with a weight in few bits, in 8 bits if asked; made by
the cuda target's fusion."""

from .reference import gated_quantised_linear
from .schema import SCHEMA

__all__ = ["SCHEMA", "gated_quantised_linear"]
