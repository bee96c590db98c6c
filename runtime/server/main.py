"""`ingot serve` as a process: engine, API and signals, from the first line it prints to the last request it answers.

SIGTERM or Ctrl-C drains: nobody new is admitted, `/ready` goes red, open requests may end. A second one, or the end of
`drain_timeout`, aborts: what is still open gets an error. Invariant: the engine's process never outlives this one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn

from ...engines.errors import EngineError
from .admission import Admission
from .app import create_app
from .board import Slot
from .config import ServerConfig
from .engine import EngineProcess
from .metrics import Observed, ServerMetrics
from .signals import after_signal

BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: ServerConfig, options: Mapping[str, Any], print_ready: bool = True) -> None:
    """Serve until a signal says stop. options: of the engine, as `LLM` takes them.

    Raises EngineError: the engine cannot be opened, or the port is taken.
    """
    with listen(config.host, config.port) as listener:
        settings = {"watchdog": config.watchdog, "longest_pause": config.stream_pause, **options}
        async with EngineProcess(config.engine, **settings) as engine:

            def announce() -> None:
                if print_ready:
                    print(
                        f"ingot serves {config.model_name} at {address_of(listener)}: {engine.max_model_len} tokens of "
                        f"context, {engine.num_kv_tokens} KV tokens, {engine.max_num_seqs} sequences at a time",
                        flush=True,
                    )

            await serve_api(config, engine, listener, announce, Slot())


async def serve_api(
    config: ServerConfig, engine: EngineProcess, listener: socket.socket, announce: Callable[[], None], slot: Slot
) -> None:
    """Serve an open engine on a socket until a signal says stop. slot: this process's among those of the server."""
    metrics = ServerMetrics(engine, config.model_name, slot)
    admission = Admission(engine.max_num_seqs, config.max_waiting, config.max_waiting_tokens, slot)
    app = create_app(Observed(engine, metrics), config, admission, metrics)
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    stop = asyncio.create_task(_stop(server, engine, admission, config.drain_timeout))
    listener.listen(BACKLOG)  # whoever reads that it serves may come at once
    announce()
    try:
        await server.serve(sockets=[listener])
    finally:
        stop.cancel()


async def _stop(server: Server, engine: EngineProcess, admission: Admission, drain_timeout: float) -> None:
    """Waits for a signal, then for open requests or another signal, then ends the server."""
    if not await after_signal(lambda: admission.drain(drain_timeout)):
        await engine.close()
    server.should_exit = True


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A socket, bound before the engine opens: a taken port is known at once. shared: others may have the same port.

    Raises EngineError.
    """
    with binding(host, port):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # asyncio does so only for sockets it makes; without it small pieces wait for the client's acknowledgement
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    return listener


@contextmanager
def binding(host: str, port: int) -> Iterator[None]:
    """Inside, a socket is bound to the address. Raises EngineError in the place of what the system says."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # the latter: of a name that cannot be a host's
        why = getattr(error, "strerror", None) or error
        raise EngineError(f"{host}:{port} cannot be served on ({why}); choose another --port or --host.") from None


def address_of(listener: socket.socket) -> str:
    """The URL that a socket is reached by."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
