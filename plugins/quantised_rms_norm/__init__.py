"""`ingot::QuantisedRMSNorm`: a norm whose result is left in 8 bits; made by the cuda target's fusion."""

from .reference import quantised_rms_norm
from .schema import SCHEMA

__all__ = ["SCHEMA", "quantised_rms_norm"]
