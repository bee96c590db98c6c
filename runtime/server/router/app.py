"""The router as an application: what it answers itself, and everything else through the proxy.

`/health` and `/ready` speak of the router, `/metrics` of it and of all servers; the paths of the API and the page are
the servers' own. API keys are the servers' matter, too: they are passed on, and a server's 401 comes back.
"""

from __future__ import annotations

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from ..admission import Admission
from ..errors import HANDLED, Refused, respond
from ..security import Envelope
from ..telemetry import add_telemetry
from ..tracing import open_tracing
from .backends import Backend, Fleet
from .checks import Checks
from .config import RouterConfig
from .metrics import RouterMetrics
from .proxy import Proxy
from .upstream import Upstream


class Router:
    """All parts of a router: `app` to serve, `checks.run` to keep going, `admission.drain` and `abort` to end it."""

    def __init__(self, config: RouterConfig):
        self.fleet = Fleet([Backend(url) for url in config.backends], config.margin)
        self._upstreams = {each: Upstream(each.url, config.connect_timeout) for each in self.fleet.backends}
        self.checks = Checks(self._upstreams, config)
        self.admission = Admission(config.max_open, 0, 0)  # who may wait is the servers' to say
        self._metrics = RouterMetrics(self.fleet, self.checks.metrics)
        proxy = Proxy(self.fleet, self._upstreams, self.checks, self.admission, config.max_body_bytes)
        routes = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._page),
            Mount("/", proxy),
        ]
        app = Starlette(routes=routes, exception_handlers=dict.fromkeys(HANDLED, respond))
        app.add_middleware(Envelope)
        add_telemetry(app, open_tracing(config.otlp_endpoint))
        self.app = app

    def abort(self) -> None:
        """Close all connections to servers: what is open ends with an error."""
        for upstream in self._upstreams.values():
            upstream.abort()

    async def _health(self, request: Request) -> Response:
        """The router lives."""
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """At least one server would take a request."""
        if not self.admission.accepting:
            raise Refused(503, "The router is shutting down.")
        if not self.fleet.num_ready:
            raise Refused(503, "No server is ready.")
        return _json({"status": "ready", "ready": self.fleet.num_ready, "backends": len(self.fleet.backends)})

    async def _page(self, request: Request) -> Response:
        return Response(await self._metrics.page(), media_type=self._metrics.content_type)


def _json(data: object) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")
