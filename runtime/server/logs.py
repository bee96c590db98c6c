"""The log: lines for people or JSON for machines, on standard error, with fields besides the sentence.

`log.info("drained", extra=fields("drained", seconds=3))` is a line that both forms carry. Nothing of a prompt, an
answer or an API key is ever handed to it.
"""

from __future__ import annotations

import json
import logging
import time
from enum import StrEnum
from typing import Any


class LogFormat(StrEnum):
    """How a line is written."""

    text = "text"
    json = "json"


class LogLevel(StrEnum):
    """What is written: `info` has a line for each request, `debug` one for probes of health and metrics, too."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def set_up(level: str, form: str, process: str | None = None) -> None:
    """Begin to log. process: what this process is called where several write to the same place."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if form == LogFormat.json else TextLines(process))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def fields(event: str, **values: Any) -> dict[str, dict[str, Any]]:
    """What a call of the logger takes as `extra`: what happened, in a word that does not change, and its numbers."""
    return {"fields": {"event": event, **values}}


class JsonLines(logging.Formatter):
    """An object a line: time (UTC), level, logger, message, the process if it has a name, and the fields."""

    def __init__(self, process: str | None = None):
        super().__init__()
        self._process = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), **self._process, **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """The sentence, and behind it the fields that have a value as `name=value`."""

    def __init__(self, process: str | None = None):
        super().__init__(f"%(asctime)s %(levelname)s {f'{process} ' if process else ''}%(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        values = getattr(record, "fields", {}).items()
        told = [f" {name}={_word(value)}" for name, value in values if name != "event" and value is not None]
        return super().formatMessage(record) + "".join(told)


def _word(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)
