"""`ingot::RotaryCosSin`: the cosines and sines of a step, once for all layers."""

from .reference import rotary_cos_sin
from .schema import SCHEMA

__all__ = ["SCHEMA", "rotary_cos_sin"]
