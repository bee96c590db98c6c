"""An API process's way to an engine process that another process keeps: what `Supervisor` is where there is only one.

The socket is known by a path. While there is no engine process, connections wait in the socket's queue, and are served
by the next one. What became of an engine process is known to its keeper, which tells (`told`). Invariant: a request
that an engine process took with it is told so at once, and the next connection knows none of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any

from ...engines.errors import EngineError
from .channel import ChannelError, Frames, FromEngine, Message, Ready, frame
from .engine import EngineProcess

PAUSE = 0.2  # seconds before connecting again
_GONE = "The engine process is gone; it is being restarted: send the request again."


class Connection(asyncio.Protocol):
    """One connection to an engine process. `ready` is what it said first, `over` set when it is closed."""

    pid: int | None = None  # the engine process's

    def __init__(self, hear: Callable[[FromEngine], None]):
        self._hear = hear
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self._frames: Frames[FromEngine] = Frames(FromEngine)
        self._transport: asyncio.Transport | None = None

    def send(self, message: Message) -> None:
        """Queue a message; dropped where nobody is there. Raises RequestError: it cannot be encoded."""
        data = frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """The engine ends what this connection has asked for."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                if isinstance(message, Ready):
                    self.pid = message.pid
                    self.ready.set_result(message)
                else:
                    self._hear(message)
        except ChannelError:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set_result(None)


class Link:
    """Keeps a connection. `hear` gets the engine's messages, `lost` a sentence whenever the connection breaks."""

    def __init__(self, path: str, hear: Callable[[FromEngine], None], lost: Callable[[str], None]):
        self._path, self._hear, self._lost = path, hear, lost
        self.child: Connection | None = None  # only while the engine is open
        self.down = _GONE  # why there is none
        self.gave_up = False
        self.restarts = 0
        self._up = asyncio.Event()  # set when waiting has an end
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        """Connect, and keep connected. Raises EngineError: nobody has the socket."""
        ready = await self._connect()
        self._task = asyncio.create_task(self._run())
        return ready

    async def wait(self, timeout: float) -> Connection:
        """The connection. Raises EngineError: none within `timeout` seconds, or never again."""
        if self.child is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._up.wait(), timeout)
        if self.child is None:
            raise EngineError(self.down)
        return self.child

    def told(self, down: str, gave_up: bool) -> None:
        """What the engine's keeper says: why there is no engine process, and whether there will be none."""
        self.down, self.gave_up = down or _GONE, self.gave_up or gave_up
        if gave_up:
            self._up.set()

    async def close(self) -> None:
        """Let go of the engine; a second call does nothing."""
        self.told("The engine is closed; open it again.", True)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        child, self.child = self.child, None
        if child is not None:
            child.close()

    async def _run(self) -> None:
        while self.child is not None:
            await asyncio.shield(self.child.over)
            self.child = None
            if not self.gave_up:
                self._up.clear()
            self._lost(self.down)
            while self.child is None:
                await asyncio.sleep(PAUSE)
                with contextlib.suppress(EngineError):
                    await self._connect()
                    self.restarts += 1

    async def _connect(self) -> Ready:
        try:
            loop = asyncio.get_running_loop()
            _, child = await loop.create_unix_connection(lambda: Connection(self._hear), self._path)
        except OSError as error:
            raise EngineError(f"The engine process cannot be reached ({error}).") from None
        try:
            await asyncio.wait((child.ready, child.over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not child.ready.done():
                child.close()
        if child.over.done():
            raise EngineError(_GONE)
        self.child = child
        self._up.set()
        return child.ready.result()


class SharedEngine(EngineProcess):
    """As `EngineProcess`, of an engine process that is another process's child. path: of the socket it listens on."""

    def __init__(self, engine: str | os.PathLike, path: str, **options: Any):
        super().__init__(engine, **options)
        self._path = path

    def _supervised(self) -> Link:
        self._link = Link(self._path, self._hear, self._lost)
        return self._link

    def told(self, down: str, gave_up: bool) -> None:
        """What the engine's keeper says, see `Link`."""
        self._link.told(down, gave_up)
