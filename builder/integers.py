"""The integers of a configuration that was made in Python: the command line has checked its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engines.errors import BuildError, shown

MOST = 2**31 - 1


def check_integers(config: Any, lowest: Mapping[str, int]) -> None:
    """lowest: of each field. Raises BuildError unless each that is not None is an integer from there to `MOST`."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MOST):
            raise BuildError(f"{name} is {shown(value)}; expected an integer from {low} to {MOST}.")
