"""How a server ends: one signal lets it end in order, a second one at once."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .logs import fields

Result = TypeVar("Result")
log = logging.getLogger("ingot.server")


async def after_signal(end: Callable[[], Awaitable[Result]]) -> Result | None:
    """Waits for SIGTERM or Ctrl-C, then for `end`. A second signal cancels that; None then."""
    loop, signals = asyncio.get_running_loop(), asyncio.Queue[str]()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    log.info("%s: ending in order", await signals.get(), extra=fields("stopping"))
    ending, again = asyncio.ensure_future(end()), asyncio.ensure_future(signals.get())
    try:
        await asyncio.wait((ending, again), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            return ending.result()
        log.warning("%s: ending at once", again.result(), extra=fields("stopping_at_once"))
        return None
    finally:
        for task in (ending, again):
            task.cancel()
