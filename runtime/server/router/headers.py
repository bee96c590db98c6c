"""Which headers pass the router: all that say something of the request or the answer, none of the connection's own."""

from __future__ import annotations

from .upstream import Headers

# RFC 9110, section 7.6.1, and what each connection says for itself
_OWN = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_OF_REQUEST = _OWN | {b"host", b"content-length", b"expect", b"x-request-id"}
_OF_ANSWER = _OWN | {b"date", b"server", b"x-request-id"}  # ours are added on the way out


def request_headers(headers: Headers, request_id: str) -> list[tuple[bytes, bytes]]:
    """What the server gets of a client's headers, and the id that the client gets, too."""
    return [*_passing(headers, _OF_REQUEST), (b"x-request-id", request_id.encode())]


def answer_headers(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What the client gets of a server's headers."""
    return _passing(headers, _OF_ANSWER)


def seconds_of(retry_after: str) -> int | None:
    """The seconds of a Retry-After; None for a date or nothing."""
    return int(retry_after) if retry_after.isdecimal() and len(retry_after) < 10 else None


def _passing(headers: Headers, dropped: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    headers = [(name.lower(), value) for name, value in headers]
    named = {
        each.strip().lower() for name, value in headers if name == b"connection" for each in value.split(b",")
    }  # fmt: skip
    return [(name, value) for name, value in headers if name not in dropped and name not in named]
