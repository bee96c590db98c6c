"""Server-Sent Events, and what happens when the client goes away.

A response begins when its first event is there, so that whatever is wrong before that has a status of its own; later
errors are an event, and the stream ends without `[DONE]`. A client that is slow gets fewer, longer events: the next one
is made only when the last has been taken. One that leaves ends the work within a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from .errors import Gone, describe, response_of

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(data: Any) -> bytes:
    """One event with a JSON value. JSON has no raw line ends, so it is one line."""
    return b"data: " + _encoder.encode(data) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client disconnects first. Raises Gone then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends what `events` yields: encoded events, any number at a time, the last with DONE behind them.

    A write costs more than all that is done for an event besides, so the last event and the end are one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]):
        self.status_code = 200
        self.background = None
        # buffering proxies would hold tokens back
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(scope, receive, send))
        except Gone:
            pass

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def put(data: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with aclosing(self._events):
                async for data in self._events:
                    await put(data, more=not data.endswith(DONE))
        except Exception as error:
            if not started:
                await response_of(error)(scope, receive, send)
                return
            await put(event(describe(error)[1]), more=False)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
