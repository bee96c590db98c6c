"""The errors a user may see. Each message is one sentence: what was found, what was expected, what to do."""

from typing import Any


class IngotError(Exception):
    """Base of the errors that are reported to the user without a traceback."""


class BuildError(IngotError):
    """A checkpoint cannot be made into an engine (exit code 2)."""


class EngineError(IngotError):
    """An engine directory cannot be opened or does not fit this machine (exit code 3)."""


class RequestError(IngotError):
    """A request cannot be honoured (HTTP 4xx, exit code 2)."""


def shown(value: Any, length: int = 60) -> str:
    """A wrong value as a sentence repeats it, however long it is. Python refuses to write integers of thousands of
    digits, wherever they are in it."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits" if isinstance(value, int) else "a value that is too long to show"
    return text if len(text) <= length else f"{text[:length]}.."
