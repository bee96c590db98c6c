"""`ingot serve --api-workers N`: several API processes on one port, all of them before one engine process.

Python answers HTTP on one core, so where an engine makes more tokens than that core can hand out, there must be more of
them. This process serves nothing itself: it keeps the engine process, as `Supervisor` does, and the workers. Each has a
listening socket of its own on the same port, among which the kernel spreads connections; the sockets stay open here, so
connections to a worker that died wait for its successor. What must hold for all together is on a board (board.py).

SIGTERM or Ctrl-C drains all workers, a second one aborts what is open. Invariant: no worker and no engine process
outlives this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...engines.errors import EngineError
from ..capacity import ServeConfig
from .board import Slot, board
from .channel import Ready
from .config import ServerConfig
from .logs import fields
from .main import address_of, listen
from .signals import after_signal
from .supervisor import Supervisor
from .worker import Setting, State

FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0  # seconds before a start that follows a death; doubled each time
STEADY = 60.0  # seconds of life after which a death counts as the first again
GRACE = 5.0  # seconds that a worker has after its drain, or after the second signal
START_TIMEOUT = 600.0  # seconds until the engine is open
_LOOK = 0.1  # seconds
log = logging.getLogger("ingot.server")


class Worker:
    """One API process, started again when it dies."""

    def __init__(self, setting: Setting, slot: Slot):
        self._setting, self._slot = setting, slot
        self.name = f"worker {setting.index}"
        self.process: asyncio.subprocess.Process | None = None
        self.serves = asyncio.Event()  # it did, once

    async def run(self, state: State) -> None:
        """Start it, and again whenever it dies, until cancelled. Raises EngineError: it never served."""
        delay = FIRST_DELAY
        while True:
            began = time.monotonic()
            process = await self._start(state)
            assert process.stdout is not None
            if await process.stdout.readline():
                self.serves.set()
            code = await process.wait()
            self._slot.vacate(self._setting.index)
            what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            if not self.serves.is_set():
                raise EngineError(f"API {self.name} {what} before it served; its own words are above.")
            delay = FIRST_DELAY if time.monotonic() - began > STEADY else delay
            lost = fields("worker_lost", worker=self.name)
            log.error("API %s %s; it is started again in %g s", self.name, what, delay, extra=lost)
            await asyncio.sleep(delay)
            delay = min(LONGEST_DELAY, 2 * delay)

    async def _start(self, state: State) -> asyncio.subprocess.Process:
        try:
            self.process = process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", f"{__package__}.worker", stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE, pass_fds=(self._setting.listener, self._setting.board),
                start_new_session=True,  # Ctrl-C in a terminal is for the parent, which tells all
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"API {self.name} cannot be started ({error}).") from None
        self._write(self._setting.encode() + state.encode())
        started = fields("worker_started", worker=self.name, pid=process.pid)
        log.info("API %s is process %d", self.name, process.pid, extra=started)
        return process

    def tell(self, state: State) -> None:
        """How the engine process is doing now."""
        self._write(state.encode())

    def _write(self, data: bytes) -> None:
        if self.process is not None and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(data)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it lives."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def ended(self) -> None:
        """Waits until its process is gone."""
        if self.process is not None:
            await self.process.wait()


async def serve_workers(
    config: ServerConfig, options: Mapping[str, Any], num_workers: int, print_ready: bool = True
) -> None:
    """Serve an engine by so many API processes until a signal says stop. config, options: as `main.serve` takes them.

    Raises EngineError: the engine cannot be opened, the port is taken, or an API process cannot serve.
    """
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(each) for each in _listen(config, num_workers)]
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="ingot-"))  # nobody else may enter it
        path = str(Path(folder, "engine"))
        clients = held.enter_context(socket.socket(socket.AF_UNIX))
        clients.bind(path)
        clients.listen(4 * num_workers)
        file = board(num_workers)
        held.callback(os.close, file)
        slot = Slot(file, 0, num_workers)
        workers = [
            Worker(Setting(config, path, listener.fileno(), file, i, num_workers), slot)
            for i, listener in enumerate(listeners)
        ]
        engine = Supervisor(
            config.engine.resolve(), asdict(ServeConfig(**options)), lambda _: None, lambda _: None, config.watchdog,
            START_TIMEOUT, config.stream_pause, clients,
        )  # fmt: skip
        try:
            ready = await engine.start()
            for listener in listeners:
                listener.listen(1024)
            await _run(workers, engine, config, listeners[0], ready if print_ready else None)
        finally:
            for worker in workers:
                worker.signal(signal.SIGKILL)  # those that were to end in order have
            for worker in workers:
                await worker.ended()
            await engine.close()


async def _run(
    workers: Sequence[Worker], engine: Supervisor, config: ServerConfig, listener: socket.socket, ready: Ready | None
) -> None:
    """Everything at once, until a signal, or until one of the workers cannot be kept."""
    state = State("", False)
    keeping = [asyncio.ensure_future(worker.run(state)) for worker in workers]

    async def in_order() -> None:
        for task in keeping:  # those that end now are not to be started again
            task.cancel()
        for worker in workers:
            worker.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_all_ended(workers), config.drain_timeout + GRACE)

    async def follow() -> None:
        while True:
            found = State("" if engine.child else engine.down, engine.gave_up)
            if found != state:
                state.down, state.gave_up = found.down, found.gave_up
                for worker in workers:
                    worker.tell(state)
            await asyncio.sleep(_LOOK)

    async def announce() -> None:
        for worker in workers:
            await worker.serves.wait()
        if ready is not None:
            print(
                f"ingot serves {config.model_name} at {address_of(listener)}: {ready.max_model_len} tokens of "
                f"context, {ready.num_kv_tokens} KV tokens, {ready.max_num_seqs} sequences at a time, "
                f"{len(workers)} API workers",
                flush=True,
            )

    stopping = asyncio.ensure_future(_stop(workers, in_order))
    beside = [asyncio.ensure_future(work()) for work in (follow, announce)]
    try:
        # a worker's task ends with an error, or cancelled by the stop, which is waited for then
        ended: set[asyncio.Future[Any]] = set()
        watched: set[asyncio.Future[Any]] = {stopping, *keeping}
        while stopping not in ended:
            ended, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                if not task.cancelled():
                    task.result()
    finally:
        for task in (stopping, *keeping, *beside):
            task.cancel()
        await asyncio.gather(stopping, *keeping, *beside, return_exceptions=True)


async def _stop(workers: Sequence[Worker], in_order: Any) -> None:
    """Waits for a signal and until all workers have drained; a second signal aborts in them what is still open."""
    if await after_signal(lambda: _true_after(in_order())) is None:
        for worker in workers:
            worker.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_all_ended(workers), GRACE)


async def _true_after(work: Any) -> bool:
    await work
    return True


async def _all_ended(workers: Sequence[Worker]) -> None:
    for worker in workers:
        await worker.ended()


def _listen(config: ServerConfig, num: int) -> list[socket.socket]:
    """Sockets that share a port which nobody else has, as yet without listening. Raises EngineError."""
    if not hasattr(socket, "SO_REUSEPORT"):
        raise EngineError("api_workers is above 1, but this system cannot share a port; leave it out.")
    with listen(config.host, config.port) as probe:  # shares with nobody, so it fails where another server listens
        port = probe.getsockname()[1]
    return [listen(config.host, port, shared=True) for _ in range(num)]
