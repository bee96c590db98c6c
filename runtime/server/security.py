"""What stands between the network and the endpoints: API keys, the size and depth of bodies, request ids.

The middlewares are plain ASGI (nothing is wrapped or buffered, so a stream stays a stream and a disconnect is seen).
Keys are compared in constant time; whatever a client sends is bounded before it is parsed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, Gone, response_of

MAX_JSON_DEPTH = 64
_OPEN = frozenset(("/", "/health", "/ready", "/metrics", "/version", "/openapi.json"))  # need no key, nor does /page/
REQUEST_ID = r"[A-Za-z0-9._:/+=-]{1,128}"  # UUIDs, trace ids, base64
_DRAINED = 4  # a body of up to this many limits is read to its end, so that an honest client hears why it is refused
# a string, also one that never ends, or a bracket: one match each, so that any body is scanned in linear time
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|([\[{])|([\]}])', re.DOTALL)


class Envelope:
    """The outermost layer: gives every response its X-Request-Id and turns a bug into a 500 that tells nothing."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id")
        valid = asked is not None and re.fullmatch(REQUEST_ID, asked)
        request_id = asked if asked is not None and valid else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def sender(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if asked is not None and not valid:
            sentence = "The header X-Request-Id must have 1 to 128 characters out of A-Z a-z 0-9 . _ : / + = -"
            await response_of(ApiError(400, f"{sentence}.", "X-Request-Id"))(scope, receive, sender)
            return
        try:
            await self._app(scope, receive, sender)
        except Exception as error:
            if started:
                raise  # half an answer is out: only the connection can say that it is not whole
            await response_of(error)(scope, receive, sender)


class Access:
    """Lets through who has one of the keys, as `Authorization: Bearer KEY`; with no keys, everybody."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] != "lifespan" and scope["path"] not in _OPEN and not scope["path"].startswith("/page/")
        if guarded and self._digests and not self._known(Headers(scope=scope).get("authorization", "")):
            error = ApiError(
                401,
                "The API key is missing or wrong; send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
            )
            await response_of(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # the bytes that were sent
        # all of them are compared, whichever fits: the time says nothing
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The JSON body. Raises ApiError: 415 for another content type or coding, 413 above `max_bytes`, 400 too deep."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps web pages of other origins from posting without being asked
        raise ApiError(415, f"The content type is {kind[:60]!r}; it must be application/json.")
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise ApiError(415, f"The content encoding is {coding[:60]!r}; send the body as it is, without one.")
    announced = request.headers.get("content-length", "")[:18]
    size = int(announced) if announced.isdecimal() else 0
    too_large = ApiError(413, f"The body has more than {max_bytes} bytes, which is the limit; send less at a time.")
    if size > _DRAINED * max_bytes:
        raise too_large
    pieces, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Gone
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size <= max_bytes:
            pieces.append(piece)
        elif size > _DRAINED * max_bytes:
            break
    if size > max_bytes:
        raise too_large
    body = b"".join(pieces)
    check_depth(body)
    return body


def check_depth(body: bytes) -> None:
    """Raises ApiError where brackets nest deeper than `MAX_JSON_DEPTH`; brackets in strings do not count."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for found in _STRUCTURE.finditer(body):
        depth += (found.lastindex == 1) - (found.lastindex == 2)
        if depth > MAX_JSON_DEPTH:
            raise ApiError(400, f"The body nests deeper than {MAX_JSON_DEPTH} levels, which is the limit.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of equal length, whatever was sent
