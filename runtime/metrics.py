"""What the engine has been doing: counts since it opened, and latencies of the recent past.

Recording is an append per token; percentiles are worked out when somebody asks. Times are the engine's own, from the
arrival of a request to the commit of a token; `ingot bench` measures what clients see.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .request import RequestMetrics
from .speculation.statistics import SpeculationStats
from .step import SchedulerStats

RECENT = 8192  # values of each latency that are kept
WINDOW = 10.0  # seconds over which tokens_per_s is taken


@dataclass(frozen=True)
class Latency:
    """Seconds, over the last `RECENT` values: a percentile is a value that occurred (nearest rank)."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Latency | None:
        """None for no values."""
        ordered = sorted(values)
        if not ordered:
            return None
        at = [ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)]
        return cls(len(ordered), sum(ordered) / len(ordered), *at)


@dataclass(frozen=True)
class Metrics:
    """A snapshot. Counts are since the engine opened; None where nothing has happened yet."""

    running: int
    waiting: int
    kv_utilisation: float  # share of pages held by open requests
    kv_cached: float  # share of pages that hold nothing but reusable prefixes
    prefix_queried: int  # prompt tokens of admitted requests
    prefix_hits: int  # of them, tokens found in the prefix cache
    preemptions: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    finished: dict[str, int]  # by finish reason
    tokens_per_s: float  # output, over the last 10 seconds
    step: Latency | None  # from one commit to the next, while there was work
    ttft: Latency | None  # arrival to first token
    tpot: Latency | None  # per request: (last token - first token) / (tokens - 1)
    inter_token: Latency | None
    e2e: Latency | None  # arrival to end
    healthy: bool
    speculation: SpeculationStats = SpeculationStats()

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of prompt tokens found in the prefix cache."""
        return self.prefix_hits / self.prefix_queried if self.prefix_queried else None


@dataclass
class Recorder:
    """Collects in the loop's thread; `snapshot` may be called from any."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    _step: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _ttft: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _tpot: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _inter_token: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _e2e: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _tokens: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))  # (when, how many) by step
    _busy_since: float | None = None

    def step(self, now: float, num_tokens: int, busy: bool) -> None:
        """A commit brought so many output tokens; `busy`: there is work left, so that the next follows at once."""
        self.steps += 1
        if self._busy_since is not None:
            self._step.append(now - self._busy_since)
        self._busy_since = now if busy else None
        self.output_tokens += num_tokens
        self._tokens.append((now, num_tokens))

    def tokens(self, before: float | None, now: float, arrival: float) -> None:
        """Tokens of one request came; `before` is when its previous ones did."""
        if before is None:
            self._ttft.append(now - arrival)
        else:
            self._inter_token.append(now - before)

    def end(self, times: RequestMetrics, reason: str, num_prompt: int, num_output: int) -> None:
        """A request ended."""
        self.finished[reason] = self.finished.get(reason, 0) + 1
        self.prompt_tokens += num_prompt
        if times.finished is None or reason in ("abort", "error"):
            return
        self._e2e.append(times.finished - times.arrival)
        if times.first_token is not None and num_output > 1:
            self._tpot.append((times.finished - times.first_token) / (num_output - 1))

    def snapshot(self, stats: SchedulerStats, healthy: bool) -> Metrics:
        """The state of things, with the scheduler's."""
        now = time.monotonic()
        recent = [(when, count) for when, count in self._tokens.copy() if when > now - WINDOW]
        # a window that has only begun is as long as what is in it
        span = now - recent[0][0] if len(recent) > 1 else WINDOW
        return Metrics(
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_utilisation=stats.kv_utilisation,
            kv_cached=stats.num_cached_pages / stats.num_pages,
            prefix_queried=stats.prefix_queried_tokens,
            prefix_hits=stats.prefix_hit_tokens,
            preemptions=stats.num_preemptions,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            finished=dict(self.finished),
            tokens_per_s=sum(count for _, count in recent) / max(span, 1e-9),
            step=Latency.of(self._step.copy()),
            ttft=Latency.of(self._ttft.copy()),
            tpot=Latency.of(self._tpot.copy()),
            inter_token=Latency.of(self._inter_token.copy()),
            e2e=Latency.of(self._e2e.copy()),
            healthy=healthy,
            speculation=stats.speculation,
        )
