"""`ingot serve` as a process: engine, API and signals, from the first line it prints to the last request it answers.

SIGTERM or Ctrl-C drains: nobody new is admitted, `/ready` goes red, open requests may end. A second one, or the end of
`drain_timeout`, aborts: what is still open gets an error. Invariant: the engine's process never outlives this one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn

from ...engines.errors import EngineError
from .admission import Admission
from .app import create_app
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
    listener = _listen(config)
    try:
        async with EngineProcess(config.engine, watchdog=config.watchdog, **options) as engine:
            metrics = ServerMetrics(engine, config.model_name)
            admission = Admission(engine.max_num_seqs, config.max_waiting, config.max_waiting_tokens)
            app = create_app(Observed(engine, metrics), config, admission, metrics)
            server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
            stop = asyncio.create_task(_stop(server, engine, admission, config.drain_timeout))
            listener.listen(BACKLOG)  # whoever reads that it serves may come at once
            if print_ready:
                print(
                    f"ingot serves {config.model_name} at {address_of(listener)}: {engine.max_model_len} tokens of "
                    f"context, {engine.num_kv_tokens} KV tokens, {engine.max_num_seqs} sequences at a time",
                    flush=True,
                )
            try:
                await server.serve(sockets=[listener])
            finally:
                stop.cancel()
    finally:
        listener.close()


async def _stop(server: Server, engine: EngineProcess, admission: Admission, drain_timeout: float) -> None:
    """Waits for a signal, then for open requests or another signal, then ends the server."""
    if not await after_signal(lambda: admission.drain(drain_timeout)):
        await engine.close()
    server.should_exit = True


def _listen(config: ServerConfig) -> socket.socket:
    """The socket, bound before the engine opens: a taken port is known at once."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # asyncio does so only for sockets it makes; without it small pieces wait for the client's acknowledgement
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        raise EngineError(
            f"{config.host}:{config.port} cannot be served on ({error.strerror or error}); choose another --port or "
            "--host."
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL that a socket is reached by."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
