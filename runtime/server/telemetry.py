"""What is said of each HTTP request when it is over: a line in the log and, where that is on, a span.

The outermost layer makes a `Record`, whoever comes to know something writes it there, and at the end it is told. Where
neither log nor spans are on, the layer is not there. Invariant: a record has names, numbers and reasons, nothing of a
prompt, an answer or a key; a path that is not ours is not repeated, since it may hold anything.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...engines.errors import RequestError
from ..request import RequestOutput
from .logs import fields
from .tracing import Tracing

GONE = 499  # nginx's number for a client that left before there was a status
_ROUTES = frozenset(
    ("/", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/tokenize", "/detokenize", "/v1/models",
     "/v1/completions", "/v1/chat/completions")
)  # fmt: skip
_FOLDERS = {"/v1/models/": "/v1/models/{model}", "/page/": "/page/{file}"}
_QUIET = frozenset(("/", "/health", "/ready", "/metrics", "/page/{file}"))  # asked again and again by machines
log = logging.getLogger("ingot.request")


@dataclass
class Record:
    """What is known of one HTTP request. Times are seconds; None: it has not come so far, or has none."""

    method: str
    route: str  # "": no path of ours
    request_id: str = ""
    trace_id: str | None = None
    backend: str | None = None  # the router's choice, the last one
    model: str | None = None
    status: int | None = None
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0  # of the prompt's tokens, those found in the prefix cache
    ttft: float | None = None  # from arrival to the first token of any answer
    queued: float | None = None  # from arrival to the first step
    duration: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)  # as the engine says, in the order of ends
    gone: bool = False  # the client left before the end
    error: str | None = None  # the kind of what broke it

    def generated(self, model: str, num_prompt: int, num_output: int, last: RequestOutput | None) -> None:
        """A prompt's answers are over: with `last`, the newest output that was there."""
        self.model = model
        self.num_prompt += num_prompt
        self.num_output += num_output
        unfinished = "error" if self.error else "abort"
        if last is None:
            self.finish_reasons.append(unfinished)
            return
        self.num_cached += last.num_cached_tokens
        self.finish_reasons += [answer.finish_reason or unfinished for answer in last.outputs]
        if times := last.metrics:
            self.queued = _sooner(self.queued, times.first_scheduled, times.arrival)
            self.ttft = _sooner(self.ttft, times.first_token, times.arrival)

    def broke(self, error: Exception) -> None:
        """An answer or the request ended with an exception. What a client did wrong is no error of ours."""
        if not isinstance(error, RequestError):
            self.error = type(error).__name__

    def told(self) -> dict[str, Any]:
        """The fields of the log's line."""
        found: dict[str, Any] = {
            "request_id": self.request_id, "method": self.method, "route": self.route or "(none)",
            "status": self.status, "duration": round(self.duration, 6), "gone": self.gone,
        }  # fmt: skip
        if self.finish_reasons:
            found |= {
                "model": self.model, "prompt_tokens": self.num_prompt, "cached_tokens": self.num_cached,
                "output_tokens": self.num_output, "queue_time": self.queued and round(self.queued, 6),
                "ttft": self.ttft and round(self.ttft, 6), "finish_reason": ",".join(self.finish_reasons),
            }  # fmt: skip
        others = {"backend": self.backend, "error": self.error, "trace_id": self.trace_id}
        return found | {name: value for name, value in others.items() if value is not None}


current: ContextVar[Record | None] = ContextVar("ingot_request", default=None)


def route_of(path: str) -> str:
    """The path, or its pattern; "" for one that is not ours."""
    if path in _ROUTES:
        return path
    return next((pattern for folder, pattern in _FOLDERS.items() if path.startswith(folder)), "")


def add_telemetry(app: Any, tracing: Tracing | None) -> None:
    """Puts the layer around an application, unless nobody would hear of it. To be called last."""
    if tracing is not None or log.isEnabledFor(logging.INFO):
        app.add_middleware(Telemetry, tracing=tracing)


class Telemetry:
    """The layer. tracing: None makes no spans."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None):
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(scope["method"], route_of(scope["path"]))
        quiet = record.route in _QUIET
        span = self._tracing.begin(scope, record) if self._tracing and not quiet else None
        began, complete = time.monotonic(), False

        async def hear() -> Message:
            message = await receive()
            record.gone |= message["type"] == "http.disconnect" and not complete
            return message

        async def say(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                record.status = message["status"]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        token = current.set(record)
        try:
            await self._app(scope, hear, say)
        except Exception as error:
            record.broke(error)
            raise
        finally:
            current.reset(token)
            record.duration = time.monotonic() - began
            record.request_id = scope.get("state", {}).get("request_id", "")
            record.status = record.status or GONE
            if self._tracing and span is not None:
                self._tracing.end(span, record)
            level = logging.DEBUG if quiet else logging.INFO
            if log.isEnabledFor(level):
                log.log(level, "request", extra=fields("request", **record.told()))


def _sooner(known: float | None, then: float | None, arrival: float) -> float | None:
    if then is None:
        return known
    return then - arrival if known is None else min(known, then - arrival)
