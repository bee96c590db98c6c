"""Replicas of one engine as child processes: a port and a GPU each, started again when they die, stopped in order.

A port is reserved by a socket that is bound and does not listen, so it stays the replica's own over restarts. Whether
a replica serves is seen by the router's checks alone. Replicas on one GPU share its memory, see `Gpu`. Invariant: no
replica outlives the router, see replica.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from ....engines.errors import EngineError
from ...capacity import ServeConfig
from ..config import ServerConfig
from ..logs import fields
from .backends import Backend
from .replica import Setting

LOOPBACK = "127.0.0.1"
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before a start that follows a death; doubled each time
STEADY = 60.0  # seconds of life after which a death counts as the first again
_LOOK = 0.1  # seconds
_COUNT_DEVICES = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
print(count.value)
"""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Gpu:
    """Where replicas run: a GPU, or None where there is none to tell apart. share: of its memory, for each of them.

    An engine takes its share less what is in use already, by whomever: so those on one GPU open one after another, and
    the one that opens is given its own share and those of all that hold theirs.
    """

    device: str | None
    share: float | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    holders: set[Replica] = field(default_factory=set)

    def options(self) -> dict[str, Any]:
        """Of the engine that opens next."""
        return {} if self.share is None else {"gpu_memory_utilization": self.share * (len(self.holders) + 1)}


class Replica:
    """One of them."""

    def __init__(
        self, number: int, config: ServerConfig, options: Mapping[str, Any], gpu: Gpu, threads: Mapping[str, str]
    ):  # fmt: skip
        self.name, self.gpu = f"replica {number}", gpu
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((LOOPBACK, 0))
        port = self._reserved.getsockname()[1]
        self.url = f"http://{LOOPBACK}:{port}"
        self._setting = Setting(replace(config, host=LOOPBACK, port=port), dict(options), self.name)
        device = {} if gpu.device is None else {"CUDA_VISIBLE_DEVICES": gpu.device}
        self._environment = {**threads, **os.environ, **device}
        self.process: asyncio.subprocess.Process | None = None
        self.num_starts = 0

    async def run(self, backend: Backend) -> None:
        """Start it, and again whenever it dies or hangs, until cancelled. Raises EngineError: it never was ready."""
        was_ready, delay = False, FIRST_DELAY
        while True:
            async with self.gpu.turn:
                began = time.monotonic()
                await self._start()
                assert self.process is not None
                ended = asyncio.ensure_future(self.process.wait())
                while not (ended.done() or backend.ready):
                    await asyncio.wait([ended], timeout=_LOOK)
                self.gpu.holders.add(self)
            serves = backend.ready  # from now on silence is no longer that of an engine which is being loaded
            while not ended.done():
                if backend.silent:
                    log.error("%s hangs and is killed", self.name, extra=fields("replica_hung", replica=self.name))
                    self.signal(signal.SIGKILL)
                await asyncio.wait([ended], timeout=_LOOK)
            self.gpu.holders.discard(self)
            code = ended.result()
            what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            was_ready |= serves
            if not was_ready:
                raise EngineError(f"{self.name.capitalize()} {what} before it served; its own words are above.")
            backend.lose()
            delay = FIRST_DELAY if time.monotonic() - began > STEADY else delay
            lost = fields("replica_lost", replica=self.name)
            log.error("%s %s; it is started again in %g s", self.name, what, delay, extra=lost)
            await asyncio.sleep(delay)
            delay = min(LONGEST_DELAY, 2 * delay)

    async def _start(self) -> None:
        self.num_starts += 1
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", f"{__package__}.replica", stdin=asyncio.subprocess.PIPE, env=self._environment,
                start_new_session=True,  # Ctrl-C in a terminal is for the router, which drains first
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"{self.name.capitalize()} cannot be started ({error}).") from None
        assert self.process.stdin is not None
        options = {**self._setting.options, **self.gpu.options()}
        self.process.stdin.write(msgspec.structs.replace(self._setting, options=options).encode())
        with contextlib.suppress(ConnectionError):  # it is dead already: `run` will see
            await self.process.stdin.drain()
        started = fields("replica_started", replica=self.name, pid=self.process.pid, backend=self.url)
        log.info("%s is process %d at %s", self.name, self.process.pid, self.url, extra=started)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it lives."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def ended(self) -> None:
        """Waits until its process is gone, and gives its port back."""
        if self.process is not None:
            await self.process.wait()
        self._reserved.close()


class Replicas:
    """All of them. Raises EngineError for a number that cannot be, or for more memory of a GPU than it has."""

    def __init__(self, num_replicas: int, config: ServerConfig, options: Mapping[str, Any], devices: Sequence[str]):
        if num_replicas < 1:
            raise EngineError(f"replicas is {num_replicas}; it must be at least 1.")
        gpus = _shared_out(devices, num_replicas, options.get("gpu_memory_utilization"))
        # threads of one step wait for each other, and spin: with more of them than processors a step takes many times
        # as long. What the user has set goes before it
        share = max(1, (os.cpu_count() or 1) // num_replicas)
        threads = {"OMP_NUM_THREADS": str(share)} if num_replicas > 1 else {}
        self.each = [Replica(i, config, options, gpu, threads) for i, gpu in enumerate(gpus)]

    async def run(self, backends: Sequence[Backend]) -> None:
        """Keep all of them running until cancelled. Raises EngineError: one could not be started at all."""
        tasks = [asyncio.ensure_future(each.run(backend)) for each, backend in zip(self.each, backends, strict=True)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all that live."""
        for each in self.each:
            each.signal(number)

    async def ended(self) -> None:
        """Waits until all are gone; while `run` runs, they are started again instead."""
        for each in self.each:
            await each.ended()


def _shared_out(devices: Sequence[str], num_replicas: int, asked: float | None) -> list[Gpu]:
    """Where each replica runs. asked: the share of a GPU's memory for each replica, if the user said so."""
    if not devices:
        return [Gpu(None) for _ in range(num_replicas)]
    most = -(-num_replicas // len(devices))  # on one GPU
    if asked is not None and most * asked > 1:
        raise EngineError(
            f"gpu_memory_utilization is {asked:g} for each replica, and {most} of them share a GPU; ask for at most "
            f"{1 / most:.2g}, or leave it out."
        )
    if most > 1:
        log.warning("%d replicas share %d GPUs", num_replicas, len(devices))
    gpus = []
    for i, device in enumerate(devices[:num_replicas]):
        here = len(range(i, num_replicas, len(devices)))
        share = None if here == 1 else ServeConfig.gpu_memory_utilization / here if asked is None else asked
        gpus.append(Gpu(device if len(devices) > 1 else None, share))
    return [gpus[i % len(gpus)] for i in range(num_replicas)]


async def devices_of(environment: Mapping[str, str]) -> list[str]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them; the variable, where it is set, says which."""
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip()]
    # counted by the driver, in a process of its own: the router shall not touch a GPU, and torch takes seconds to load
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _COUNT_DEVICES, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    output, _ = await process.communicate()
    return [str(i) for i in range(int(output))] if output.strip().isdigit() else []
