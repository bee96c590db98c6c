"""The way to one server: HTTP/1.1 over pooled connections, answers read piece by piece as they come.

h11, which uvicorn brings, knows the protocol; the sockets are asyncio's, whose bounded buffers make the server wait
when our client is slow. What has failed is told apart by what the server may have done: `Unreachable` has seen nothing
of the request, `Broken` may have. Invariant: a connection is either whole and pooled, in use once, or closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import h11

Headers = Iterable[tuple[bytes, bytes]]
IDLE = 2.0  # seconds in the pool; uvicorn closes what is idle for 5
_PIECE = 1 << 16


class Unreachable(Exception):
    """No connection was made."""


class Broken(Exception):
    """The connection ended before the answer did. `stale`: it had been used before and nothing came on it, so the
    server may just have closed it."""

    stale = False


class Reply:
    """An answer whose head is there. `read` brings the next piece of its body, b"" at the end."""

    def __init__(self, connection: Connection, head: h11.Response):
        self._connection = connection
        self.status = head.status_code
        self.headers: list[tuple[bytes, bytes]] = list(head.headers)
        self.complete = False

    def header(self, name: bytes) -> str:
        """The value, "" if there is none. name: in lower case."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    async def read(self) -> bytes:
        """Raises Broken: the connection ended too early."""
        while not self.complete:
            match await self._connection.event():
                case h11.Data(data=data) if data:
                    return bytes(data)
                case h11.EndOfMessage():
                    self.complete = True
        return b""

    async def whole(self, limit: int) -> bytes:
        """The body up to about `limit` bytes; more may follow if `complete` is False. Raises Broken."""
        pieces, size = [], 0
        while size < limit and (piece := await self.read()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)


class Connection:
    """One connection and the state of the protocol on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._protocol = h11.Connection(h11.CLIENT)
        self.idle_since = 0.0

    async def ask(self, request: h11.Request, body: bytes) -> Reply:
        """Send a request and wait for the head of its answer. Raises Broken."""
        parts: list[h11.Event] = [request, h11.EndOfMessage()]
        if body:
            parts.insert(1, h11.Data(data=body))
        self._writer.writelines([self._protocol.send(part) or b"" for part in parts])
        with contextlib.suppress(ConnectionError):  # a server that refuses a body may answer and not read it
            await self._writer.drain()
        while not isinstance(event := await self.event(), h11.Response):
            if not isinstance(event, h11.InformationalResponse):
                raise Broken("The server closed the connection.")
        return Reply(self, event)

    async def event(self) -> h11.Event:
        """The next one from the server. Raises Broken."""
        try:
            while (event := self._protocol.next_event()) is h11.NEED_DATA:
                self._protocol.receive_data(await self._reader.read(_PIECE))
        except (OSError, h11.RemoteProtocolError) as error:
            raise Broken(str(error)) from None
        if not isinstance(event, h11.Event):  # PAUSED: nothing more will come
            raise Broken("The server sent nothing more.")
        return event

    @property
    def closed(self) -> bool:
        """Whether the server has closed it."""
        return self._reader.at_eof()

    def reusable(self) -> bool:
        """Whether another request can follow the one that has been answered; it is made ready for that."""
        if self._protocol.our_state is h11.DONE and self._protocol.their_state is h11.DONE:
            self._protocol.start_next_cycle()
            return not self.closed
        return False

    def abort(self) -> None:
        """Close it now, whatever is under way; a reader of it gets Broken."""
        self._writer.transport.abort()


class Upstream:
    """A server by its base URL. To be used in one event loop."""

    def __init__(self, url: str, connect_timeout: float):
        parts = urlsplit(url)
        self._secure = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)
        self._authority, self._base = parts.netloc.encode(), parts.path.rstrip("/").encode()
        self._connect_timeout = connect_timeout
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()

    @asynccontextmanager
    async def ask(
        self, method: str, target: bytes, headers: Headers = (), body: bytes = b"", fresh: bool = False
    ) -> AsyncIterator[Reply]:
        """Send a request; its answer for the time of a `with` block, after which the connection is free or closed.

        target: path and query. headers: without those about connection, length and host. fresh: on a new connection.
        Raises Unreachable, Broken, and h11.LocalProtocolError for what HTTP does not allow.
        """
        sized = [(b"content-length", b"%d" % len(body))] if body or method in ("POST", "PUT", "PATCH") else []
        request = h11.Request(
            method=method, target=self._base + target, headers=[(b"host", self._authority), *headers, *sized]
        )
        pooled = None if fresh else self._take()
        connection = pooled or await self._connect()
        self._used.add(connection)
        reply = None
        try:
            try:
                reply = await connection.ask(request, body)
            except Broken as error:
                error.stale = pooled is not None
                while error.stale and self._idle:  # so will these be
                    self._idle.pop().abort()
                raise
            yield reply
        finally:
            if reply is not None and reply.complete and connection in self._used and connection.reusable():
                self._used.discard(connection)
                connection.idle_since = time.monotonic()
                self._idle.append(connection)
            else:
                self._discard(connection)

    def abort(self) -> None:
        """Close every connection: whoever reads an answer gets Broken."""
        for connection in [*self._used, *self._idle]:
            self._discard(connection)
        self._idle.clear()

    def _discard(self, connection: Connection) -> None:
        self._used.discard(connection)
        connection.abort()

    def _take(self) -> Connection | None:
        """The connection that was used last, and none that the server has closed or may be about to close."""
        old = time.monotonic() - IDLE
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > old and not connection.closed:
                return connection
            connection.abort()  # and so are all that were used before it
        return None

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(self._connect_timeout):
                return Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._secure))
        except (OSError, TimeoutError) as error:
            raise Unreachable(str(error) or "no answer") from None
