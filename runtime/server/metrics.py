"""What the server tells Prometheus, by the names that vLLM's users know where the meaning is the same.

States and counts are the engine's own snapshot, read when somebody scrapes. Latencies are histograms, observed where
answers pass on their way out: `Observed` stands before the engine and looks as it does. They count in a slot of
board.py, so whichever process is asked tells of all; and several tokens at once cost one call, not one each.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Sequence
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..metrics import Metrics
from ..request import RequestOutput
from .board import Slot
from .telemetry import current

PREFIX = "ingot:"
FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_GAUGES = {
    "num_requests_running": ("Requests that are being decoded.", lambda m: m.running),
    "num_requests_waiting": ("Requests in the queue.", lambda m: m.waiting),
    "kv_cache_usage_perc": ("Share of KV pages held by open requests, 0 to 1.", lambda m: m.kv_utilisation),
    "kv_cache_reusable_perc": ("Share of KV pages with prefixes that may be reused, 0 to 1.", lambda m: m.kv_cached),
    "output_tokens_per_second": ("Output tokens a second, of the last ten.", lambda m: m.tokens_per_s),
    "step_seconds_p50": ("Time of a step, median of the recent ones.", lambda m: m.step.p50 if m.step else 0.0),
    "step_seconds_p99": ("Time of a step, of a hundred recent ones the slowest.",
                         lambda m: m.step.p99 if m.step else 0.0),
    "spec_decode_steps_perc": ("Of the steps that gave tokens, the share that verified drafts, 0 to 1.",
                               lambda m: m.speculation.share or 0.0),
    "engine_healthy": ("1 while the engine serves.", lambda m: float(m.healthy)),
}  # fmt: skip
_COUNTERS = {
    "prompt_tokens": ("Prompt tokens of requests that ended.", lambda m: m.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda m: m.output_tokens),
    "num_preemptions": ("Requests thrown out of the batch to be computed again.", lambda m: m.preemptions),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda m: m.prefix_queried),
    "prefix_cache_hits": ("Of them, tokens found.", lambda m: m.prefix_hits),
    "engine_steps": ("Steps of the engine.", lambda m: m.steps),
    "spec_decode_num_drafts": ("Drafts of a request that were verified.", lambda m: m.speculation.drafts),
    "spec_decode_num_draft_tokens": ("Tokens of these drafts.", lambda m: m.speculation.drafted),
    "spec_decode_num_accepted_tokens": ("Of them, tokens that were accepted.", lambda m: m.speculation.accepted),
    "spec_decode_num_steps": ("Steps that verified drafts.", lambda m: m.speculation.steps),
}


class Histogram:
    """Values counted by size, in places of a slot: one per bucket, each alone, one for what is larger, and the sum."""

    def __init__(self, name: str, what: str, bounds: Sequence[float], slot: Slot):
        self._name, self._what, self._bounds, self._slot = name, what, tuple(bounds), slot
        self._begin = slot.take(len(self._bounds) + 2)

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value so many times."""
        own = self._slot.own
        own[self._begin + bisect_left(self._bounds, value)] += times
        own[self._begin + len(self._bounds) + 1] += value * times

    def family(self, model_name: str) -> Metric:
        """What all processes have counted."""
        count, buckets = 0.0, []
        for i, bound in enumerate((*self._bounds, float("inf"))):
            count += self._slot.total(self._begin + i)
            buckets.append((floatToGoString(bound), count))
        family = HistogramMetricFamily(PREFIX + self._name, self._what, labels=["model_name"])
        family.add_metric([model_name], buckets, self._slot.total(self._begin + len(self._bounds) + 1))
        return family


class ServerMetrics(Collector):
    """The metrics of one engine; `page` is what `/metrics` answers. llm: has `metrics()`, as AsyncLLM does."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, llm: Any, model_name: str, slot: Slot | None = None):
        self._llm, self.model = llm, model_name
        self._histograms: list[Histogram] = []
        slot = slot or Slot()

        def histogram(name: str, what: str, bounds: Sequence[float]) -> Histogram:
            self._histograms.append(Histogram(name, what, bounds, slot))
            return self._histograms[-1]

        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", (0.001, *SLOW))
        self.inter_token = histogram("inter_token_latency_seconds", "Between tokens of an answer.", FAST)
        self.tpot = histogram("request_time_per_output_token_seconds", "Mean time between tokens of a request.", FAST)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", SLOW)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", SLOW)
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", COUNTS)
        self.generated = histogram("request_generation_tokens", "Tokens of an answer.", COUNTS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    async def page(self) -> bytes:
        """All of it in Prometheus' text format, as the engine is now; if it does not answer, as it was last."""
        if measure := getattr(self._llm, "measure", None):  # an engine in a process of its own
            await measure()
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """The engine's snapshot as Prometheus wants it."""
        found: Metrics = self._llm.metrics()
        for name, (what, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, what, labels=["model_name"])
            gauge.add_metric([self.model], value(found))
            yield gauge
        for name, (what, value) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, what, labels=["model_name"])
            counter.add_metric([self.model], value(found))
            yield counter
        ended = CounterMetricFamily(PREFIX + "request_success", "Requests that ended.",
                                    labels=["model_name", "finished_reason"])  # fmt: skip
        for reason, count in sorted(found.finished.items()):
            ended.add_metric([self.model, reason], count)
        yield ended
        accepted = CounterMetricFamily(PREFIX + "spec_decode_num_accepted_tokens_per_pos",
                                       "Accepted tokens by their place in the draft, the first is 0.",
                                       labels=["model_name", "position"])  # fmt: skip
        for position, count in enumerate(found.speculation.accepted_at):
            accepted.add_metric([self.model, str(position)], count)
        yield accepted
        for each in self._histograms:
            yield each.family(self.model)
        info = InfoMetricFamily(PREFIX + "build", "What is serving.")
        info.add_metric([], {"version": version("ingot"), "model_name": self.model})
        yield info


class Observed:
    """The engine, its answers timed on their way out, for the metrics and the record of the request that they are for.

    Everything but `generate` is the engine's own.
    """

    def __init__(self, llm: Any, metrics: ServerMetrics):
        self._llm, self._metrics = llm, metrics

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def generate(self, prompt: Any, *arguments: Any, **options: Any) -> AsyncIterator[RequestOutput]:
        """As the engine's; see `AsyncLLM.generate`."""
        record, output = current.get(), None
        last: float | None = None
        seen = 0
        answers = self._llm.generate(prompt, *arguments, **options)
        try:
            async for output in answers:
                now = time.monotonic()
                new = sum(len(answer.token_ids) for answer in output.outputs)
                new = new if options.get("deltas") else new - seen
                seen += new
                if new:
                    if last is None:
                        self._begin(output)
                    else:
                        # several tokens that come at once came one after the other
                        self._metrics.inter_token.observe((now - last) / new, new)
                    last = now
                if output.finished:
                    self._end(output, seen)
                yield output
        except Exception as error:
            if record:
                record.broke(error)
            raise
        finally:
            await answers.aclose()
            if record:
                ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else ()
                record.generated(self._metrics.model, len(ids), seen, output)

    def _begin(self, output: RequestOutput) -> None:
        """The first token is there."""
        times = output.metrics
        self._metrics.prompt.observe(len(output.prompt_token_ids))
        if times and times.first_scheduled is not None and times.first_token is not None:
            self._metrics.queue.observe(times.first_scheduled - times.arrival)
            self._metrics.ttft.observe(times.first_token - times.arrival)

    def _end(self, output: RequestOutput, num_tokens: int) -> None:
        metrics, times = self._metrics, output.metrics
        metrics.generated.observe(num_tokens)
        if times and times.finished is not None:
            metrics.e2e.observe(times.finished - times.arrival)
            if times.first_token is not None and num_tokens > len(output.outputs):
                between = num_tokens - len(output.outputs)
                metrics.tpot.observe((times.finished - times.first_token) * len(output.outputs) / between)
