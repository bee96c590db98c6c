"""Keeps an engine process running: starts it, watches that it commits steps, kills it if it hangs, starts another.

What an engine process was asked dies with it; engine.py decides what is asked again. A start that fails, or a process
that dies before its first step, is tried again at most MAX_FAILURES times in a row within FAILURE_WINDOW seconds.
Invariant: at most one engine process lives, so two never share a GPU; the next one starts when the last is reaped.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ...engines.errors import EngineError
from .channel import ChannelError, Close, Failed, Frames, FromEngine, Message, News, Ping, Pong, Ready, frame
from .logs import fields

MAX_FAILURES = 3
FAILURE_WINDOW = 60.0  # seconds
PAUSE = 0.5  # seconds before a start that follows a failed one, times the failures so far
GRACE = 5.0  # seconds that an engine may take to close before it is killed
_REAP = 2.0  # seconds for a process that has closed its socket to exit by itself
_log = logging.getLogger(__name__)


class Child(asyncio.Protocol):
    """One engine process. `hear` gets what it says after Ready; `over` what became of it, when it is reaped."""

    def __init__(self, hear: Callable[[FromEngine], None]):
        self._hear = hear
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.over: asyncio.Future[str] = loop.create_future()  # "was killed by SIGKILL": a sentence lacks its subject
        self.refusal: str | None = None  # why it could not open the engine, in its own sentence
        self._frames: Frames[FromEngine] = Frames(FromEngine)
        self._why: str | None = None  # known before the process is gone
        self._doomed = False
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._burial: asyncio.Task[None] | None = None

    async def spawn(self, setting: Mapping[str, Any], listener: socket.socket | None) -> None:
        """Start the process: `ready` is set when it is open, `over` in any case. Raises EngineError if it cannot be.

        setting, listener: see child.py.
        """
        ours, theirs = socket.socketpair()
        with theirs:  # the last reference to it is then the process's own
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
            fds = [sock.fileno() for sock in (theirs, listener) if sock is not None]
            told = json.dumps({**setting, "listener": fds[1] if listener else None})
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", f"{__package__}.child", str(theirs.fileno()), told,
                    pass_fds=fds, stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C in a terminal is for the API; and the group can be killed
                )  # fmt: skip
            except OSError as error:
                raise EngineError(f"The engine process cannot be started ({error}).") from None
        if self._doomed:
            self.kill()

    def send(self, message: Message) -> None:
        """Queue a message; one for a process that is gone is dropped. Raises RequestError: it cannot be encoded."""
        data = frame(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def kill(self, why: str | None = None) -> None:
        """End the process and all it has started, at once. `why` is what `over` will say, unless that is known."""
        self._why = self._why or why
        self._doomed = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End it in order, or after GRACE seconds by force."""
        self.send(Close())
        await asyncio.wait([self.over], timeout=GRACE)
        self.kill()
        await self.ended()

    @property
    def pid(self) -> int | None:
        """The process's id; its group has the same."""
        return None if self._process is None else self._process.pid

    async def ended(self) -> str:
        """What became of it, once it is gone."""
        return await asyncio.shield(self.over)  # several may wait, and none of them cancels it

    # -- asyncio's callbacks -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for message in self._frames.feed(data):
                match message:
                    case Ready() if not self.ready.done():
                        self.ready.set_result(message)
                    case Failed():  # its last word
                        if self.ready.done():
                            self._why = message.why
                        else:
                            self.refusal = message.why
                        self._transport.close()
                    case _:
                        self._hear(message)
        except ChannelError as error:
            self.kill(f"sent what cannot be read ({error}) and was killed")

    def connection_lost(self, error: Exception | None) -> None:
        self._burial = asyncio.ensure_future(self._bury())

    async def _bury(self) -> None:
        if self._process is None:
            self.over.set_result("could not be started")
            return
        try:
            code = await asyncio.wait_for(self._process.wait(), _REAP)
        except TimeoutError:
            self.kill()
            code = await self._process.wait()
        self.over.set_result(self._why or _ending(code))


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


class Supervisor:
    """Starts and restarts `Child`ren. `hear` gets their messages, `lost` a sentence whenever one is gone.

    watchdog: seconds that an engine with open requests may take for a step, and any engine for an answer to a ping.
    start_timeout: seconds until it is open. longest_pause, listener: see child.py.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        hear: Callable[[FromEngine], None],
        lost: Callable[[str], None],
        watchdog: float,
        start_timeout: float,
        longest_pause: float = 0.0,
        listener: socket.socket | None = None,
    ):
        self._setting = {"engine": str(folder), "options": dict(options), "longest_pause": longest_pause}
        self._clients = listener
        self._listener, self._lost = hear, lost
        self._watchdog, self._start_timeout = watchdog, start_timeout
        self.child: Child | None = None  # only while it is open
        self.down = "The engine process has not been started."  # why there is no child
        self.gave_up = False
        self.restarts = 0
        self._starting: Child | None = None
        self._up = asyncio.Event()  # set when waiting has an end: there is a child, or never will be
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._steps, self._working = 0, False  # as of the last Pong
        self._proven = False  # this child has brought something
        self._stalled = self._silent = 0.0  # seconds
        self._pinged = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        """The first start, which is not tried again. Raises EngineError as `Session` does in the engine process."""
        ready = await self._open()
        _log.info("the engine process was started", extra=fields("engine_started", pid=ready.pid))
        self._task = asyncio.create_task(self._run())
        return ready

    async def wait(self, timeout: float) -> Child:
        """The open child. Raises EngineError: none within `timeout` seconds, or never again."""
        if self.child is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._up.wait(), timeout)
        if self.child is None:
            raise EngineError(self.down)
        return self.child

    async def close(self) -> None:
        """End the child and start no other. A second call does nothing."""
        self._give_up("The engine is closed; open it again.")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        child, self.child = self.child or self._starting, None
        if child is not None:
            await child.close()

    # -- the life of a child -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while self.child is not None:
                watch = asyncio.create_task(self._watch(self.child))
                try:
                    what = await self.child.ended()
                finally:
                    watch.cancel()
                lost, self.child = self.child, None
                self._up.clear()
                self.down = f"The engine process {what}; it is being restarted: send the request again."
                _log.error(self.down, extra=fields("engine_lost", pid=lost.pid))
                self._count(failed=not self._proven)
                self._lost(self.down)
                await self._restart(what)
        except Exception as error:  # a bug here: nobody shall wait for a child that nobody starts
            _log.exception("the engine process is not supervised any more")
            self._give_up(f"The engine process cannot be restarted ({type(error).__name__}: {error}).")

    async def _restart(self, what: str) -> None:
        while len(self._failures) < MAX_FAILURES or time.monotonic() - self._failures[0] > FAILURE_WINDOW:
            await asyncio.sleep(PAUSE * len(self._failures))
            try:
                ready = await self._open()
                self.restarts += 1
                again = fields("engine_restarted", pid=ready.pid, restarts=self.restarts)
                _log.warning("the engine process was started again", extra=again)
                return
            except EngineError as error:
                what = f"was started again and did not open the engine ({error})"
                _log.error("The engine process %s.", what, extra=fields("engine_not_started"))
                self._count(failed=True)
        self._give_up(
            f"The engine process {what}; it failed {MAX_FAILURES} times in a row and is not started again: "
            "mend the cause and restart the server."
        )
        _log.error(self.down, extra=fields("engine_given_up"))

    def _count(self, failed: bool) -> None:
        if failed:
            self._failures.append(time.monotonic())
        else:
            self._failures.clear()

    def _give_up(self, why: str) -> None:
        self.gave_up, self.down = True, why
        self._up.set()

    async def _open(self) -> Ready:
        child = self._starting = Child(self._hear)
        await child.spawn(self._setting, self._clients)
        either: list[asyncio.Future[Any]] = [child.ready, child.over]
        await asyncio.wait(either, timeout=self._start_timeout, return_when=asyncio.FIRST_COMPLETED)
        if not child.ready.done():
            late = not child.over.done()
            child.kill()
            what = await child.ended()
            if late:
                raise EngineError(f"The engine was not open after {self._start_timeout:g} s, the start_timeout.")
            raise EngineError(child.refusal or f"The engine process {what} before the engine was open.")
        self._steps, self._working, self._proven = 0, False, False
        self._stalled = self._silent = 0.0
        self._pinged = False
        self.child, self._starting = child, None
        self._up.set()
        return child.ready.result()

    # -- the watchdog --------------------------------------------------------------------------------------------------

    def _hear(self, message: FromEngine) -> None:
        if isinstance(message, Pong):
            self._pinged, self._silent = False, 0.0
            if message.steps != self._steps or not message.working:
                self._stalled = 0.0
            self._steps, self._working = message.steps, message.working
        else:
            self._proven |= isinstance(message, News)
            self._listener(message)

    async def _watch(self, child: Child) -> None:
        """Kills the child when it hangs. A pause of this process counts as one tick: it says nothing of the child."""
        tick = min(1.0, self._watchdog / 4)
        while True:
            if not self._pinged:  # at most one is under way, so a child that hangs piles up none
                self._pinged = True
                child.send(Ping())
            before = time.monotonic()
            await asyncio.sleep(tick)
            passed = min(time.monotonic() - before, 2 * tick)
            self._silent += passed
            self._stalled += passed if self._working else 0.0
            if self._silent > self._watchdog:
                return self._hangs(child, "did not answer")
            if self._stalled > self._watchdog:
                return self._hangs(child, "committed no step")

    def _hangs(self, child: Child, what: str) -> None:
        what = f"{what} for {self._watchdog:g} s and was killed"
        _log.error("The engine process %s.", what, extra=fields("engine_hung", pid=child.pid))
        child.kill(what)
