"""`ingot::GatedLinear`: act(gate) * up of one product with packed gates and ups; made by the cuda target's fusion."""

from .reference import gated_linear
from .schema import SCHEMA

__all__ = ["SCHEMA", "gated_linear"]
