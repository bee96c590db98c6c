"""`ingot serve DIR`: an engine on HTTP, for OpenAI's clients."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from ...engines.cli import Debug, Engine
from ...engines.errors import EngineError
from ...engines.extras import pip_install
from ..cli import Draft, LoadFormat, MaxSeqs, MaxTokens, NumDrafts, NumNodes, PrefixCache, Speculate
from .logs import LogFormat, LogLevel
from .logs import set_up as set_up_log

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")]
Drain = Annotated[float, typer.Option(help="Seconds that open requests have after SIGTERM.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="As --log-level info: what happens, too.")]
Level = Annotated[LogLevel, typer.Option(help="info: a line for each request, too.")]
Form = Annotated[LogFormat, typer.Option(help="json: an object a line.")]
Collector = Annotated[
    str | None,
    typer.Option(help="Send OpenTelemetry spans there, as http://localhost:4318; needs ingot\\[otel].", metavar="URL"),
]


def set_up(what: str, level: LogLevel, form: LogFormat) -> None:
    """What the commands of the server begin with: logging, and a sentence where its packages are missing."""
    try:
        import fastapi  # noqa: F401  the extra is one: if this is there, so is the rest
    except ImportError:
        raise EngineError(f"{what} needs FastAPI; install it with {pip_install('serve')}.") from None
    set_up_log(level, form)


def serve(
    engine: Engine,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="INGOT_API_KEY", help="Clients must send it; may be given more than once."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Let pages of this origin call the API (CORS).")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines behind one router, a GPU each where there are.")] = 1,
    api_workers: Annotated[int, typer.Option(min=1, help="Processes that answer HTTP, before one engine.")] = 1,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of a request at most, prompt and answer.")] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of the GPU's memory for each engine; 0.9, or a part of it where they share a GPU."),
    ] = None,
    kv_cache_memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Of each engine's KV cache, instead of what is free: a part of the memory."),
    ] = None,
    prefix_cache: PrefixCache = True,
    load_format: LoadFormat = "auto",
    speculate: Speculate = None,
    draft_engine: Draft = None,
    num_draft_tokens: NumDrafts = 4,
    num_draft_nodes: NumNodes = 0,
    max_waiting: Annotated[int, typer.Option(help="Sequences that may wait; past them clients get 429.")] = 1024,
    max_waiting_tokens: Annotated[int, typer.Option(help="Prompt tokens that may wait.")] = 1 << 20,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take.")] = None,
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds until its first token.")] = None,
    drain_timeout: Drain = 30.0,
    watchdog: Annotated[float, typer.Option(help="Seconds without a step after which the engine is replaced.")] = 60.0,
    stream_pause: Annotated[
        float, typer.Option(help="Seconds at most that tokens wait for more where many streams are open; 0: none do.")
    ] = 0.05,
    log_level: Level = LogLevel.warning,
    log_format: Form = LogFormat.text,
    verbose: Verbose = False,
    otlp_endpoint: Collector = None,
    debug: Debug = False,
) -> None:
    """Serve an engine with OpenAI's API until SIGTERM or Ctrl-C, which let open requests end."""
    if api_workers > 1 and replicas > 1:
        raise typer.BadParameter(
            "--api-workers and --replicas cannot be combined: each replica has an API process of its own already."
        )
    log_level = LogLevel.info if verbose else log_level
    set_up("serving", log_level, log_format)
    from ..capacity import ServeConfig
    from .config import ServerConfig
    from .main import serve as run
    from .router.main import serve_replicas
    from .workers import serve_workers

    config = ServerConfig(
        engine=engine, host=host, port=port, served_model_name=served_model_name, api_keys=tuple(api_key or ()),
        allowed_origins=tuple(allow_origin or ()), max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens,
        request_timeout=request_timeout, queue_timeout=queue_timeout, drain_timeout=drain_timeout, watchdog=watchdog,
        stream_pause=stream_pause, otlp_endpoint=otlp_endpoint, log_level=log_level, log_format=log_format,
    )  # fmt: skip
    options: dict[str, Any] = {
        "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "max_model_len": max_model_len,
        "prefix_cache": prefix_cache, "load_format": load_format, "speculate": speculate,
        "draft_engine": None if draft_engine is None else str(draft_engine), "num_draft_tokens": num_draft_tokens,
        "num_draft_nodes": num_draft_nodes,
    }  # fmt: skip
    if gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = gpu_memory_utilization
    if kv_cache_memory is not None:
        if not 0 < kv_cache_memory < 2**33:  # nor what is no number
            raise typer.BadParameter(f"--kv-cache-memory is {kv_cache_memory:g} GiB; it must be above 0, as 4.")
        options["kv_cache_memory"] = int(kv_cache_memory * 2**30)
    ServeConfig(**options)  # what it refuses is said once, and not by each replica
    if replicas > 1:
        asyncio.run(serve_replicas(config, options, replicas))
    elif api_workers > 1:
        asyncio.run(serve_workers(config, options, api_workers))
    else:
        asyncio.run(run(config, options))
