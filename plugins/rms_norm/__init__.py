"""`ingot::RMSNorm`: root-mean-square norm, per head or per row, with the residual add before it."""

from .reference import rms_norm
from .schema import SCHEMA

__all__ = ["SCHEMA", "rms_norm"]
