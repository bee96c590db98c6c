"""A server for the router's tests that does what it is told to, down to the byte and the broken connection."""

import asyncio
import time
from contextlib import asynccontextmanager
from functools import wraps

import httpx2
import uvicorn
from ingot.runtime.server.main import Server
from ingot.runtime.server.router.app import Router
from ingot.runtime.server.router.config import RouterConfig

EVENT_STREAM = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def asynchronous(test):
    """A test that is a coroutine, with an end."""

    @wraps(test)
    def run(*args, **options):
        asyncio.run(asyncio.wait_for(test(*args, **options), 120))

    return run


def answer(status, body=b"{}", **headers):
    """A whole answer as bytes."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{''.join(lines)}\r\n".encode() + body


def chunk(data):
    """A piece of a chunked body; an empty one ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Stub:
    """`script` answers everything but /ready: an async function of (stub, request, writer), False closes after it."""

    def __init__(self, script=None):
        self.script = script or (lambda stub, asked, writer: say(writer, answer(200, self.url.encode())))
        self.ready, self.metrics, self.asked, self.closed = 200, b"", [], 0
        self.metrics_after = 0.0  # seconds
        self._server, self._writers = None, set()
        self.port = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def refuse(self):
        """New connections from now on; those that are open stay."""
        self._server.close()

    async def stop(self):
        """Break all connections, and refuse any from now on."""
        self.refuse()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = head[0].split(" ")
                if target == "/ready":
                    await say(writer, answer(self.ready))
                elif target == "/metrics":
                    await asyncio.sleep(self.metrics_after)
                    await say(writer, answer(200, self.metrics))
                else:
                    self.asked.append((method, target, headers, body))
                    running = asyncio.ensure_future(self.script(self, self.asked[-1], writer))
                    gone = asyncio.ensure_future(reader.read(1))
                    await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
                    if not running.done():
                        running.cancel()
                        self.closed += 1
                        return
                    gone.cancel()
                    await asyncio.wait((gone,))
                    if running.result() is False:
                        return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()


async def say(writer, *pieces):
    """Write and see it off."""
    for piece in pieces:
        writer.write(piece)
        await writer.drain()


async def until(condition, seconds=30.0):
    """Waits for `condition()`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def routing(*stubs, **config):
    """A client of a router before started stubs, and the router; all are looked at before it begins."""
    for stub in stubs:
        await stub.start()
    router = Router(RouterConfig(backends=tuple(stub.url for stub in stubs), **{"check_interval": 0.05, **config}))
    server = Server(uvicorn.Config(router.app, port=0, log_config=None, access_log=False, lifespan="off"))
    tasks = [asyncio.ensure_future(router.checks.run()), asyncio.ensure_future(server.serve())]
    await until(lambda: server.started)
    await router.checks.looked()
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        async with httpx2.AsyncClient(base_url=address, timeout=20) as client:
            yield client, router
    finally:
        tasks[0].cancel()
        router.abort()
        server.should_exit = True
        await tasks[1]
        for stub in stubs:
            await stub.stop()
