"""What the router tells Prometheus: its own counts by backend. The servers' metrics are at the servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from ..metrics import PREFIX
from .backends import Backend, Fleet

_COUNTERS: dict[str, tuple[str, Callable[[Backend], float]]] = {
    "router_requests": ("Requests sent there, those sent for another server included.", lambda b: b.counts.requests),
    "router_chosen_by_prefix": ("Of them, whose beginning it had been sent before.", lambda b: b.counts.by_prefix),
    "router_refused": ("Of them, answered with 429 or 503.", lambda b: b.counts.refused),
    "router_errors": ("Connections that could not be made or broke.", lambda b: b.counts.errors),
    "router_retries": ("Requests that went on from there to another server.", lambda b: b.counts.retries),
}
_GAUGES: dict[str, tuple[str, Callable[[Backend], float]]] = {
    "router_open_requests": ("Requests that are open there.", lambda b: b.num_open),
    "router_work": ("What is open there, in sequences; prompts count by their length.", lambda b: b.work),
    "router_backend_ready": ("1 while it gets requests.", lambda b: float(b.ready)),
}


class RouterMetrics(Collector):
    """The metrics of a fleet; `page` is what `/metrics` answers."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """The counts as they are now."""
        for table, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, (what, value) in table.items():
                metric = family(PREFIX + name, what, labels=["backend"])
                for backend in self._fleet.backends:
                    metric.add_metric([backend.url], value(backend))
                yield metric
        info = InfoMetricFamily(PREFIX + "build", "What is routing.")
        info.add_metric([], {"version": version("ingot")})
        yield info
