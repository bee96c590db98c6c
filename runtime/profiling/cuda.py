"""The kernels of a step on an NVIDIA GPU: CUPTI's record, read through torch.profiler, against the engine's plan."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...engines.errors import EngineError
from ...engines.plan import FOLDER, Cubin, Plan
from ...plugins.tactic import Site, Tensor
from ..session import Session
from .floor import Ceilings, Load
from .table import Traced, Unit
from .trace import Event, TraceError, align, exclusive, split
from .workload import Watched

KINDS = "kernel", "gpu_memset"  # of entries in a trace
PARTS = ("stage", "body", "head", "sample.greedy")  # of a step whose requests are greedy


class _Expected(NamedTuple):
    """What a step of a bucket launches: symbols (None: a product), the unit of each launch, the units."""

    symbols: list[str | None]
    owners: list[int]
    units: list[Unit]


class CudaTracer:
    """Traces steps of the engine in `folder`; `dtype` is that of its activations. To be made before the engine is
    opened: the ceilings are measured in memory that the KV pool would have.

    Raises EngineError: torch sees no GPU.
    """

    def __init__(self, folder: Path, dtype: torch.dtype):
        if not torch.cuda.is_available():
            raise EngineError(
                "the profile of a cuda engine is read through torch.profiler, but this torch sees no GPU; install a "
                "torch that was built for CUDA."
            )
        self.device = torch.cuda.get_device_name()
        self.ceilings = measure(dtype)
        self._plan = Plan.open(folder / FOLDER)
        self._events: list[Event] = []
        self._expected = cache(self._expect)

    def bucket(self, load: Load) -> int:
        """Tokens that a step is padded to."""
        return self._plan.buckets[self._number(load)].tokens

    @contextmanager
    def record(self, session: Session) -> Iterator[None]:
        """Records every kernel of this process."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            yield
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(path))
            self._events = read_trace(path)

    def traced(self, steps: Sequence[Watched]) -> list[Traced | None]:
        """The steps of the last record, one for each of `steps`; None where the record has a gap.

        Raises TraceError where more than half of them cannot be read.
        """
        (first,) = (self._plan.cubins[launch.cubin] for launch in self._plan.buckets[0].parts["stage"])
        assert isinstance(first, Cubin)
        recorded = split(self._events, first.symbol)[-len(steps) :]
        # the profiler may miss what runs just after it starts, never the end
        found: list[Traced | None] = [None] * (len(steps) - len(recorded))
        failed: TraceError | None = None
        for step, events in zip(steps[len(found) :], recorded, strict=True):
            load = step.load
            expected = self._expected(self._number(load))
            try:
                found.append(read_step(events, *expected))
            except TraceError as error:
                failed = failed or error
                found.append(None)
        if 2 * found.count(None) > len(steps):
            raise failed or TraceError(
                f"the profiler recorded {len(recorded)} of {len(steps)} steps; another profiler may be running."
            )
        return found

    def _number(self, load: Load) -> int:
        return self._plan.bucket(load.tokens, len(load.queries), max(load.keys))

    def _expect(self, number: int) -> _Expected:
        plan = self._plan
        symbols: list[str | None] = []
        owners: list[int] = []
        units: list[Unit] = []
        for part in PARTS:
            node = None
            for launch in plan.buckets[number].parts[part]:
                binary = plan.cubins[launch.cubin]
                symbols.append(binary.symbol if isinstance(binary, Cubin) else None)
                if launch.node != node:
                    node = launch.node
                    units.append(Unit(site_of(plan.tactics[launch.site]), part, 0))
                last = units[-1]
                units[-1] = Unit(last.site, last.part, last.num_launches + 1)
                owners.append(len(units) - 1)
        return _Expected(symbols, owners, units)


def read_trace(path: Path) -> list[Event]:
    """Kernels of a trace in Chrome's format, and what a product clears for itself."""
    entries: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return [Event(e["name"], float(e["ts"]), float(e["dur"])) for e in entries if e.get("cat") in KINDS]


def read_step(
    events: Sequence[Event], symbols: Sequence[str | None], owners: Sequence[int], units: Sequence[Unit]
) -> Traced:
    """The units of a step from its kernels. owners: the unit of each launch. Raises TraceError."""
    times = [0.0] * len(units)
    launches = align([event.name for event in events], symbols)
    for launch, us in zip(launches, exclusive(events), strict=True):
        times[owners[launch]] += us
    end = max(event.end for event in events)
    return Traced(units, times, events[0].start, end, sum(event.duration for event in events))


def site_of(tactic: dict[str, Any]) -> Site:
    """The site that an entry of `Plan.tactics` was chosen for."""
    inputs, outputs = (
        tuple(t and Tensor(tuple(t[0]), t[1], t[2]) for t in tactic[kind]) for kind in ("inputs", "outputs")
    )
    bounds = {name: tactic[name] for name in ("max_query", "max_context")}
    return Site(tactic["op"], tactic["attributes"], inputs, outputs, **bounds)


def measure(dtype: torch.dtype) -> Ceilings:
    """What the GPU does at best; the memory that it took is given back."""
    found = Ceilings(_read_speed(), _product_speed(dtype))
    torch.cuda.empty_cache()
    return found


def _read_speed() -> float:
    """Bytes a second: memory far larger than the caches summed, or copied where that is faster."""
    data = torch.ones(min(4 << 30, torch.cuda.mem_get_info()[0] // 4) // 4, device="cuda")
    target = torch.empty_like(data)
    return data.nbytes * max(1 / _seconds(data.sum), 2 / _seconds(lambda: target.copy_(data)))


def _product_speed(dtype: torch.dtype, side: int = 8192) -> float:
    """Operations a second of one large product."""
    a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b)


def _seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """The fastest of `repeats` runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times[1:])
