"""The router as a process: before servers that run anywhere, or before replicas that it starts itself.

SIGTERM or Ctrl-C drains: no new requests, open ones may end, then replicas are told to stop and waited for. A second
one, or the end of `drain_timeout`, aborts what is open; a second one also kills the replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import uvicorn

from ....engines.manifest import Manifest
from ..config import ServerConfig
from ..main import Server, address_of, binding
from ..signals import after_signal
from .app import Router
from .config import RouterConfig
from .replicas import Replicas, devices_of

GRACE = 5  # seconds that clients have to take the end of an answer that was aborted


async def route(config: RouterConfig, print_ready: bool = True) -> None:
    """Route to servers that run, until a signal says stop. Raises EngineError: the port is taken."""
    with _listen(config.host, config.port) as listener:
        router = Router(config)

        async def announce() -> None:
            await router.checks.looked()
            ready = f"{router.fleet.num_ready} of {len(config.backends)} servers ready"
            print(f"ingot routes at {address_of(listener)}: {ready}", flush=True)

        await _run(router, listener, config.drain_timeout, None, announce() if print_ready else None)


async def serve_replicas(
    config: ServerConfig, options: Mapping[str, Any], num_replicas: int, print_ready: bool = True
) -> None:
    """Serve an engine by several processes behind one address, until a signal says stop.

    config and options are those of `serve`; each replica gets them with a port of its own. Raises EngineError: the
    engine cannot be opened, or the port is taken.
    """
    for folder in (config.engine, options.get("draft_engine")):
        if folder is not None:
            Manifest.read(folder)  # what is not there is said once, and not by each of them
    with _listen(config.host, config.port) as listener:
        replicas = Replicas(num_replicas, config, options, await devices_of(os.environ))
        router = Router(
            RouterConfig(
                backends=tuple(each.url for each in replicas.each), host=config.host, port=config.port,
                max_body_bytes=config.max_body_bytes, drain_timeout=config.drain_timeout,
                otlp_endpoint=config.otlp_endpoint,
            )
        )  # fmt: skip

        async def announce() -> None:
            while router.fleet.num_ready < num_replicas:
                await asyncio.sleep(0.05)
            print(
                f"ingot serves {config.model_name} at {address_of(listener)} with {num_replicas} replicas", flush=True
            )

        await _run(router, listener, config.drain_timeout, replicas, announce() if print_ready else None)


async def _run(
    router: Router,
    listener: socket.socket,
    drain_timeout: float,
    replicas: Replicas | None,
    announce: Coroutine[Any, Any, None] | None,
) -> None:
    """Everything at once until the first of them fails or the server has stopped."""
    server = Server(
        uvicorn.Config(
            router.app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=GRACE
        )  # fmt: skip
    )
    keeping = [asyncio.ensure_future(router.checks.run())]
    if replicas is not None:
        keeping.append(asyncio.ensure_future(replicas.run(router.fleet.backends)))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(_stop(router, drain_timeout, replicas, keeping[1:]))
    announcing = [asyncio.ensure_future(announce)] if announce is not None else []
    watched: set[asyncio.Future[Any]] = {serving, stopping, *keeping}
    try:
        ended: set[asyncio.Future[Any]] = set()
        while all(task.cancelled() for task in ended):  # the replicas' is cancelled while they end in order
            ended, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, *keeping, *announcing):
            task.cancel()
        server.should_exit = True
        router.abort()
        if replicas is not None:
            replicas.signal(signal.SIGKILL)  # those that were to end in order have
            await replicas.ended()
        found = await asyncio.gather(serving, stopping, *keeping, *announcing, return_exceptions=True)
    for error in found:
        if isinstance(error, Exception):
            raise error


async def _stop(
    router: Router, drain_timeout: float, replicas: Replicas | None, keeping: Sequence[asyncio.Future[Any]]
) -> None:
    """Waits for a signal, then for open requests, then for the replicas; a second signal ends all waiting."""

    async def in_order() -> None:
        if not await router.admission.drain(drain_timeout):
            router.abort()
        for task in keeping:  # those that end now are not to be started again
            task.cancel()
        if replicas is not None:
            replicas.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):  # one that hangs is killed after that
                await asyncio.wait_for(replicas.ended(), drain_timeout + GRACE)

    await after_signal(in_order)


def _listen(host: str, port: int) -> socket.socket:
    """The socket, bound before anything is started: a taken port is known at once."""
    with binding(host, port):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # connections inherit it. asyncio sets it only on sockets that name their protocol; without it an answer in two
        # pieces waits for the client's delayed acknowledgement, 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
