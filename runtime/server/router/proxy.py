"""One request on its way: chosen a server, sent, sent again elsewhere if nothing was lost by that, and its answer back.

Until the first bytes of an answer are passed on, a request may go to another server: as often as servers refuse it,
but only once after a connection broke, since the request itself may be the cause. An event stream passes in whole
lines, so that one that breaks ends with an event that says so and not with half of one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import h11
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..admission import Admission
from ..errors import ApiError, Gone, Refused, describe
from ..logs import fields
from ..sse import event, unless_gone
from ..telemetry import current
from .backends import Backend, Fleet
from .checks import Checks
from .headers import answer_headers, request_headers, seconds_of
from .prefix import Demand, demand_of
from .upstream import Broken, Headers, Reply, Unreachable, Upstream

PATHS = ("/", "/tokenize", "/detokenize", "/version", "/openapi.json")
FOLDERS = ("/v1/", "/page/")
WHOLE = 1 << 20  # bytes of an answer that is no stream which are awaited before any is passed on
DRAINED = 4  # a body of up to this many limits is read to its end, so that the client hears why it is refused
MAX_BREAKS = 2  # connections that may break over one request
_FULL, _UNREADY = 429, 503
_LOST = "The server was lost before the answer was complete; send the request again."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A request, read to its end."""

    method: str
    target: bytes
    headers: Headers
    body: bytes
    demand: Demand


@dataclass(frozen=True)
class _Answer:
    """A refusal, kept in case that nobody else takes the request."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Proxy:
    """The ASGI application for all that the servers answer themselves. Raises ApiError, Refused and HTTPException."""

    def __init__(
        self,
        fleet: Fleet,
        upstreams: Mapping[Backend, Upstream],
        checks: Checks,
        admission: Admission,
        max_body_bytes: int,
    ):
        self._fleet, self._upstreams, self._checks, self._admission = fleet, upstreams, checks, admission
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in PATHS and not path.startswith(FOLDERS):
            raise HTTPException(404, "There is nothing at this path")
        async with self._admission.admit(0):
            body = await self._body(receive)
            query = b"?" + scope["query_string"] if scope["query_string"] else b""
            headers = request_headers(scope["headers"], scope["state"]["request_id"])
            target = scope.get("raw_path") or path.encode()
            asked = _Asked(scope["method"], target + query, headers, body, demand_of(body) if body else Demand())
            try:
                await unless_gone(receive, self._answer(asked, send))
            except Gone:  # the request to the server has been closed
                pass
            except h11.LocalProtocolError:
                raise ApiError(400, "The request has a header that HTTP does not allow.") from None

    async def _body(self, receive: Receive) -> bytes:
        pieces, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size <= self._max_body_bytes:
                pieces.append(piece)
            elif size > DRAINED * self._max_body_bytes:
                break
        if size > self._max_body_bytes:
            raise ApiError(413, f"The body has more than {self._max_body_bytes} bytes, which is the limit.")
        return b"".join(pieces)

    async def _answer(self, asked: _Asked, send: Send) -> None:
        """Raises Refused: no server can take the request, and none has said why."""
        tried: list[Backend] = []
        refusal: _Answer | None = None
        num_breaks, last = 0, None
        perhaps_well: Backend | None = None
        while num_breaks < MAX_BREAKS:
            backend = self._fleet.choose(asked.demand, time.monotonic(), tried)
            if backend is None:
                backend, perhaps_well = perhaps_well, None
            if backend is None:
                break
            if last is not None:
                last.counts.retries += 1
            last = backend
            if record := current.get():
                record.backend = backend.url
            try:
                answer = await self._attempt(backend, asked, send)
            except Broken as error:
                num_breaks += 1
                if error.stale:  # most likely that says nothing of the server, which may be asked again if it must
                    perhaps_well = backend
                    self._checks.look(backend)
                else:
                    self._failed(backend, error)
            except Unreachable as error:
                self._failed(backend, error)
            else:
                if answer is None:
                    return
                # "full" is what a client can act on, so it goes before "not ready"
                refusal = answer if refusal is None or answer.status == _FULL else refusal
            tried.append(backend)
        if refusal is not None:
            await _send(send, refusal.status, self._told(refusal), refusal.body)
        elif num_breaks:
            raise Refused(503, _LOST, 1)
        else:
            raise Refused(503, "No server is ready; try again later.", 1)

    async def _attempt(self, backend: Backend, asked: _Asked, send: Send) -> _Answer | None:
        """Ask one server and pass its answer on; or return its refusal. Raises Unreachable or Broken: neither."""
        upstream = self._upstreams[backend]
        with self._fleet.sent(backend, asked.demand):
            async with upstream.ask(asked.method, asked.target, asked.headers, asked.body) as reply:
                if reply.status in (_FULL, _UNREADY):
                    refusal = _Answer(reply.status, answer_headers(reply.headers), await reply.whole(WHOLE))
                else:
                    refusal = None
                    backend.take()
                    if reply.header(b"content-type").startswith("text/event-stream"):
                        await self._stream(backend, reply, send)
                    else:
                        await self._plain(backend, reply, send)
        if refusal is None:
            return None
        backend.counts.refused += 1
        if refusal.status == _FULL:
            backend.refuse(time.monotonic(), seconds_of(reply.header(b"retry-after")))
        else:
            self._checks.doubt(backend)
        return refusal

    async def _plain(self, backend: Backend, reply: Reply, send: Send) -> None:
        headers = answer_headers(reply.headers)
        body = await reply.whole(WHOLE)
        if reply.complete:
            await _send(send, reply.status, headers, body)
            return
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            while piece := await reply.read():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Broken as error:
            self._failed(backend, error)
            return  # no end: the HTTP server closes the connection, from which the client knows
        await send({"type": "http.response.body", "body": b""})

    async def _stream(self, backend: Backend, reply: Reply, send: Send) -> None:
        """Pass on lines as they come; Broken is raised before the first, and an event after it."""
        headers, started = answer_headers(reply.headers), False
        held, last = b"", b"\n\n"  # held: the beginning of a line; last: what was passed on last
        try:
            while piece := await reply.read():
                held += piece
                cut = held.rfind(b"\n") + 1 or (len(held) if len(held) > WHOLE else 0)
                if not cut:
                    continue
                lines, held = held[:cut], held[cut:]
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
                last = (last + lines)[-2:]
                await send({"type": "http.response.body", "body": lines, "more_body": True})
        except Broken as error:
            if not started:
                raise
            self._failed(backend, error)
            held = (b"" if last == b"\n\n" else b"\n") + event(describe(Refused(503, _LOST))[1])
        if not started:
            await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": held})

    def _told(self, refusal: _Answer) -> list[tuple[bytes, bytes]]:
        """The refusal's headers, with the time after which the first of the full servers may have room."""
        soonest = self._fleet.soonest(time.monotonic()) if refusal.status == _FULL else None
        if soonest is None:
            return refusal.headers
        others = [(name, value) for name, value in refusal.headers if name != b"retry-after"]
        return [*others, (b"retry-after", b"%d" % soonest)]

    def _failed(self, backend: Backend, error: Exception) -> None:
        what = "cannot be reached" if isinstance(error, Unreachable) else "broke a connection"
        log.warning("it %s: %s", what, error, extra=fields("backend_failed", backend=backend.url))
        backend.counts.errors += 1
        self._checks.doubt(backend)


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
