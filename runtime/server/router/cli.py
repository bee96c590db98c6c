"""`ingot route ADDRESS ..`: one address for servers that run already, on this machine or on others."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from ....engines.cli import Debug
from ..cli import Collector, Drain, Form, Host, Level, Port, Verbose, set_up
from ..logs import LogFormat, LogLevel

Addresses = Annotated[
    list[str], typer.Argument(metavar="ADDRESS...", help="Servers, as host:port or URLs.", show_default=False)
]


def route(
    addresses: Addresses,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    max_open: Annotated[int, typer.Option(help="Requests open at a time; past them clients get 429.")] = 16384,
    margin: Annotated[
        float, typer.Option(help="Sequences that a server may have more than the idlest, if it holds the prefix.")
    ] = 4.0,
    follow_load: Annotated[
        bool, typer.Option(help="Count what others have sent to the servers, from their /metrics.")
    ] = True,
    check_interval: Annotated[float, typer.Option(help="Seconds between two looks at a server's /ready.")] = 0.5,
    check_timeout: Annotated[float, typer.Option(help="Seconds that a look may take.")] = 5.0,
    drain_timeout: Drain = 30.0,
    log_level: Level = LogLevel.warning,
    log_format: Form = LogFormat.text,
    verbose: Verbose = False,
    otlp_endpoint: Collector = None,
    debug: Debug = False,
) -> None:
    """Spread requests over servers: least work first, then whoever holds the prefix."""
    set_up("routing", LogLevel.info if verbose else log_level, log_format)
    from .config import RouterConfig, url_of
    from .main import route as run

    config = RouterConfig(
        backends=tuple(url_of(address) for address in addresses), host=host, port=port, max_open=max_open,
        margin=margin, follow_load=follow_load, check_interval=check_interval, check_timeout=check_timeout,
        drain_timeout=drain_timeout, otlp_endpoint=otlp_endpoint,
    )  # fmt: skip
    asyncio.run(run(config))
