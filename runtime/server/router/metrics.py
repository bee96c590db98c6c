"""What the router tells Prometheus: its own counts by backend, and what each server says, with a label `replica`.

One page for all, as the page at `/` needs it. A server that does not answer in time is left out, so its series end and
do not stand still.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from importlib.metadata import version

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from ..logs import fields
from ..metrics import PREFIX
from .backends import Backend, Fleet

SCRAPE_TIMEOUT = 2.0  # seconds; a server waits up to one for its engine
REPLICA = "replica"
log = logging.getLogger(__name__)

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


class RouterMetrics:
    """The metrics of a fleet; `page` is what `/metrics` answers. scrape: the page of a server within so many seconds,
    nothing if there is none."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, fleet: Fleet, scrape: Callable[[Backend, float], Awaitable[bytes]]):
        self._fleet, self._scrape = fleet, scrape

    async def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        there = [backend for backend in self._fleet.backends if not backend.silent]
        pages = await asyncio.gather(*(self._scrape(backend, SCRAPE_TIMEOUT) for backend in there))
        whole = Merged(self.collect())
        for backend, page in zip(there, pages, strict=True):
            try:
                whole.add(backend.url, page.decode())
            except (ValueError, LookupError) as error:  # a server elsewhere may be anybody's
                log.warning("its metrics cannot be read: %s", error, extra=fields("metrics", backend=backend.url))
        return generate_latest(whole)

    def collect(self) -> Iterable[Metric]:
        """The counts as they are now."""
        for table, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, (what, value) in table.items():
                metric = family(PREFIX + name, what, labels=["backend"])
                for backend in self._fleet.backends:
                    metric.add_metric([backend.url], value(backend))
                yield metric
        info = InfoMetricFamily(PREFIX + "router_build", "What is routing.")
        info.add_metric([], {"version": version("ingot")})
        yield info


class Merged:
    """Metrics of several pages by their names: of one name there may be one family on a page."""

    def __init__(self, families: Iterable[Metric]):
        self._families = {family.name: family for family in families}

    def add(self, replica: str, page: str) -> None:
        """What a server says, with its name. Raises ValueError: that is not Prometheus' text format."""
        for family in list(text_string_to_metric_families(page)):
            whole = self._families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )  # fmt: skip
            for sample in family.samples:
                inner = sample.labels.get(REPLICA)  # it is a router, too
                name = replica if inner is None else f"{replica} {inner}"
                whole.samples.append(sample._replace(labels={**sample.labels, REPLICA: name}))

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        return self._families.values()
