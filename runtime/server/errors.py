"""What a client is told when its request cannot be served: OpenAI's error body, one sentence, the right status.

Every exception that may leave an endpoint goes through `describe`, before an answer has begun as a response and after
that as an event in the stream. What is not known here is a bug: it is logged, and the client learns nothing of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec
from fastapi import Response
from starlette.exceptions import HTTPException

from ...engines.errors import EngineError, RequestError
from ..request import SamplingParams

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}
_PARAMETERS = frozenset(field.name for field in fields(SamplingParams))


class Refused(Exception):
    """There is no room for a request now. `retry_after`: seconds after which to try again, None if unknown."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class ApiError(Exception):
    """A request that the API itself turns down. `param`: the field at fault; `code`: OpenAI's word for the case."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class Gone(Exception):
    """The client closed the connection: nobody is there to be told anything."""


class ErrorDetail(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def describe(error: BaseException) -> tuple[int, ErrorBody, dict[str, str]]:
    """Status, body and headers for an exception; one that nobody foresaw is logged."""
    headers: dict[str, str] = {}
    param: str | None = None
    code: str | None = None
    match error:
        case ApiError():
            status, message, param, code = error.status, error.message, error.param, error.code
        case Refused():
            status, message = error.status, error.message
            code = "rate_limit_exceeded" if status == 429 else "unavailable"
            if error.retry_after is not None:
                headers["Retry-After"] = str(error.retry_after)
        case RequestError():
            status, message, param = 400, str(error), _named(str(error))
        case EngineError():
            status, message, code = 503, str(error), "engine_unavailable"
        case HTTPException():
            status, message = error.status_code, f"{error.detail}."
            headers.update(error.headers or {})
        case _:
            log.error("A request failed for a reason that is a bug", exc_info=error)
            status, message = 500, "The server made a mistake; it is in its log."
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return status, ErrorBody(ErrorDetail(message, _TYPES.get(status, fallback), param, code)), headers


def response_of(error: BaseException, extra: Mapping[str, str] | None = None) -> Response:
    """The whole response; for a client that has gone, one that nobody will read."""
    if isinstance(error, Gone):
        return Response(status_code=499)  # nginx's number for it, seen in access logs only
    status, body, headers = describe(error)
    return Response(
        msgspec.json.encode(body), status, media_type="application/json", headers={**headers, **(extra or {})}
    )


async def respond(request: Any, error: Exception) -> Response:
    """Starlette's exception handler."""
    return response_of(error)


HANDLED: tuple[type[Exception], ...] = (ApiError, Refused, Gone, RequestError, EngineError, HTTPException)


def _named(message: str) -> str | None:
    """The parameter that the engine's sentence begins with."""
    word = re.match(r"(?:a )?(\w+)", message)
    if message.startswith("The prompt "):
        return "prompt"
    return word[1] if word and word[1] in _PARAMETERS else None
