"""The errors a user may see. Each message is one sentence: what was found, what was expected, what to do."""


class IngotError(Exception):
    """Base of the errors that are reported to the user without a traceback."""


class BuildError(IngotError):
    """A checkpoint cannot be made into an engine (exit code 2)."""


class EngineError(IngotError):
    """An engine directory cannot be opened or does not fit this machine (exit code 3)."""


class RequestError(IngotError):
    """A request cannot be honoured (HTTP 4xx, exit code 2)."""
