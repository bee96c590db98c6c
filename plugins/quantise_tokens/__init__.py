"""`ingot::QuantiseTokens`: activations in 8 bits, with a scale for each token that is computed from it."""

from .reference import quantise_tokens
from .schema import SCHEMA

__all__ = ["SCHEMA", "quantise_tokens"]
