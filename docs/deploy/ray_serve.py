"""ingot on Ray Serve: each replica runs the server's own application, so the API is the same to the letter.

    pip install 'ingot[serve]' 'ray[serve]'
    serve run ray_serve:build engine=/engines/qwen3 replicas=2 gpus=1        # in this folder

Ray places replicas, starts them again and chooses one for each request by how many it has open, not by who holds a
prefix; `ingot serve --replicas N` or `ingot route` does. `/metrics` through Ray's proxy is that of one replica.

Run with Ray 2.60 on one machine without a GPU, gpus=0 and two replicas: whole answers and streams, a client that
leaves, Ctrl-C. Not run: GPUs, several machines, a Serve config file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ingot.engines.errors import EngineError
from ingot.runtime.server.admission import Admission
from ingot.runtime.server.app import create_app
from ingot.runtime.server.config import ServerConfig
from ingot.runtime.server.engine import EngineProcess
from ingot.runtime.server.metrics import Observed, ServerMetrics
from ray import serve
from ray.serve import Application


class Server:
    """The server's ASGI application; its engine is opened at startup and closed at shutdown."""

    def __init__(self, config: ServerConfig, options: dict[str, Any]):
        self._config, self._options = config, options
        self.engine: EngineProcess | None = None
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()
        try:
            await self._start()
        except EngineError as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.engine is not None:
            await self.engine.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        config = self._config
        self.engine = engine = EngineProcess(config.engine, watchdog=config.watchdog, **self._options)
        await engine.start()
        metrics = ServerMetrics(engine, config.model_name)
        admission = Admission(engine.max_num_seqs, config.max_waiting, config.max_waiting_tokens)
        self._app = create_app(Observed(engine, metrics), config, admission, metrics)


def build(args: dict[str, str]) -> Application:
    """What `serve run` and a Serve config file start. args: engine, a directory; model, what clients call it;
    replicas; gpus, for each of them, 0 for the cpu target; max_num_seqs, sequences in one step."""
    config = ServerConfig(engine=Path(args["engine"]).resolve(), served_model_name=args.get("model"))
    options = {"max_num_seqs": int(args["max_num_seqs"])} if "max_num_seqs" in args else {}
    server = Server(config, options)

    @serve.deployment(
        name="ingot",
        num_replicas=int(args.get("replicas", 1)),
        ray_actor_options={"num_gpus": float(args.get("gpus", 1))},
        max_ongoing_requests=2048,  # the server refuses for itself what it has no room for, with 429
        graceful_shutdown_timeout_s=config.drain_timeout,
    )
    @serve.ingress(server)
    class Ingot:
        def check_health(self) -> None:
            """Ray replaces a replica for which this raises. An engine that died is first started again in its place."""
            if server.engine is not None and server.engine.gave_up:
                server.engine.check()

    return Ingot.bind()
