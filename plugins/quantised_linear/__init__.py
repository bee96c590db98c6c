"""`ingot::QuantisedLinear`: a product with a weight in few bits, of activations as they are or in 8 bits."""

from .reference import quantised_linear
from .schema import SCHEMA

__all__ = ["SCHEMA", "quantised_linear"]
