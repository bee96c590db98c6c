"""Looks at every server again and again: is it ready, is it there at all, and what have others sent to it.

Each server has a task of its own, so that one that hangs holds up no other. A request that fails asks for a look at
once; until then its server is left out. Invariant: a server is ready only if `/ready` said so after its last failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Mapping

from ..logs import fields
from .backends import Backend
from .config import RouterConfig
from .upstream import Broken, Unreachable, Upstream

LOAD_INTERVAL = 1.0  # seconds
_PAGE = 1 << 20  # bytes of /metrics
_OPEN = re.compile(rb"^\w+:num_requests_(?:running|waiting)(?:\{[^\n]*\})? ([0-9.e+]+)\r?$", re.MULTILINE)
log = logging.getLogger(__name__)


class Checks:
    """Keeps `ready` and `elsewhere` of backends up to date while `run` runs."""

    def __init__(self, upstreams: Mapping[Backend, Upstream], config: RouterConfig):
        self._upstreams, self._config = upstreams, config
        self._wanted = {backend: asyncio.Event() for backend in upstreams}
        self._looked = {backend: asyncio.Event() for backend in upstreams}

    def look(self, backend: Backend) -> None:
        """Look at it now."""
        self._wanted[backend].set()

    def doubt(self, backend: Backend) -> None:
        """Leave it out until it has been looked at, which happens now."""
        backend.ready = False
        self.look(backend)

    async def looked(self) -> None:
        """Waits until each has been looked at once."""
        for event in self._looked.values():
            await event.wait()

    async def run(self) -> None:
        """Look until cancelled."""
        watches = [self._watch(backend) for backend in self._upstreams]
        if self._config.follow_load:
            watches += [self._follow(backend) for backend in self._upstreams]
        await asyncio.gather(*watches)

    async def _watch(self, backend: Backend) -> None:
        silent_since: float | None = None
        wanted, was_ready = self._wanted[backend], False
        while True:
            wanted.clear()
            began = time.monotonic()
            status = await self._status(backend)
            if not wanted.is_set():  # what failed meanwhile is newer than this look
                if status == 200:
                    backend.ready = True
                else:
                    backend.lose()
            if backend.ready != was_ready:
                was_ready = backend.ready
                what = fields("backend_ready" if was_ready else "backend_lost", backend=backend.url)
                log.info("it is %s", "ready" if was_ready else f"not ready ({status or 'no answer'})", extra=what)
            silent_since = None if status is not None else silent_since or began
            backend.silent = silent_since is not None and time.monotonic() - silent_since > self._config.silence
            if backend.silent:
                self._upstreams[backend].abort()  # a machine that is gone closes no connection
            self._looked[backend].set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wanted.wait(), self._config.check_interval)

    async def _status(self, backend: Backend) -> int | None:
        """What `/ready` answers on a new connection, as a client's first request would have it; None if nothing."""
        try:
            async with (
                asyncio.timeout(self._config.check_timeout),
                self._upstreams[backend].ask("GET", b"/ready", fresh=True) as reply,
            ):
                return reply.status
        except (Unreachable, Broken, TimeoutError):
            return None

    async def _follow(self, backend: Backend) -> None:
        while True:
            await asyncio.sleep(LOAD_INTERVAL)
            before = backend.num_sequences
            page = await self.metrics(backend, self._config.check_timeout) if backend.ready else b""
            there = sum(float(number) for number in _OPEN.findall(page))
            # what came or went during the look may be counted there or not
            backend.elsewhere = max(0.0, there - max(before, backend.num_sequences))

    async def metrics(self, backend: Backend, timeout: float) -> bytes:
        """What its `/metrics` says within so many seconds; nothing if there is no such page."""
        try:
            async with asyncio.timeout(timeout), self._upstreams[backend].ask("GET", b"/metrics") as reply:
                page = await reply.whole(_PAGE) if reply.status == 200 else b""
                return page if reply.complete else b""  # half a page says half the truth
        except (Unreachable, Broken, TimeoutError):
            return b""
