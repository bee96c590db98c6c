"""`ingot::Linear`: the matrix product of a checkpoint, in its own weight layout."""

from .reference import linear
from .schema import SCHEMA

__all__ = ["SCHEMA", "linear"]
