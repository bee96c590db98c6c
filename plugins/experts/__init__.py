"""`ingot::Experts`: the mixture-of-experts MLP after routing."""

from .reference import experts
from .schema import SCHEMA

__all__ = ["SCHEMA", "experts"]
