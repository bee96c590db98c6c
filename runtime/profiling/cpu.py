"""The nodes of a step on the CPU, each timed where the executor's thread runs it."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...engines.step import LOGIT_ROWS, LOGITS, TOKENS
from ...plugins.interpreter import Launch, Program, Values
from ...plugins.tactic import Site, Tensor
from ..cpu import CpuExecutor
from ..session import Session
from .floor import Ceilings, Load
from .table import Traced, Unit
from .workload import Watched, replaced


class CpuTracer:
    """Times nodes; `dtype` is that of the engine's activations."""

    def __init__(self, dtype: torch.dtype):
        self.device = f"{_processor()}, {torch.get_num_threads()} threads"
        self.ceilings = measure(dtype)
        self._steps: list[Traced] = []

    def bucket(self, load: Load) -> int:
        """Steps are not padded."""
        return load.tokens

    @contextmanager
    def record(self, session: Session) -> Iterator[None]:
        """Times every node and the sampling of this session."""
        executor = session.executor
        assert isinstance(executor, CpuExecutor) and isinstance(executor.graph, Program)
        timed = TimedProgram(executor.graph, executor.sampler.sample)
        with replaced(executor, "graph", timed), replaced(executor.sampler, "sample", timed.sample):
            yield
        self._steps = timed.finish()

    def traced(self, steps: Sequence[Watched]) -> list[Traced | None]:
        """The steps of the last record, one for each of `steps`."""
        assert len(steps) == len(self._steps)
        return list(self._steps)


class TimedProgram:
    """A program and the sampling behind it, whose nodes are timed; in place of both."""

    def __init__(self, program: Program, sample: Callable[..., Any]):
        self._program, self._sample, self._plain = program, sample, program.launches
        self._timed = [self._wrap(i, launch) for i, launch in enumerate(program.launches)]
        self._units: dict[tuple[int, int], list[Unit | None]] = {}  # by tokens and rows, which settle all shapes
        self._known: list[Unit | None] = []
        self._times: list[float] = []
        self._logits: torch.Tensor | None = None
        self._start = self._end = 0.0
        self._steps: list[Traced] = []

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        self._close()
        sizes = inputs[TOKENS].shape[0], inputs[LOGIT_ROWS].shape[0]
        self._known = self._units.setdefault(sizes, [None] * (len(self._plain) + 1))
        self._times = [0.0] * len(self._known)
        self._start = 1e6 * time.perf_counter()
        self._program.launches = self._timed
        try:
            outputs = self._program(inputs)
        finally:
            self._program.launches = self._plain
        self._end = 1e6 * time.perf_counter()
        self._logits = outputs[LOGITS]
        return outputs

    def sample(self, *arguments: Any) -> Any:
        """The sampler's, timed as the last node of the step."""
        start = time.perf_counter()
        result = self._sample(*arguments)
        end = time.perf_counter()
        self._times[-1], self._end = 1e6 * (end - start), 1e6 * end
        return result

    def finish(self) -> list[Traced]:
        """All steps so far."""
        self._close()
        return self._steps

    def _close(self) -> None:
        """The step before is over."""
        if self._logits is None:
            return
        if self._known[-1] is None:
            rows = Tensor((self._logits.shape[0],), "int32")
            self._known[-1] = Unit(Site("Sample", {}, (_tensor(self._logits),), (rows,)), "sample")
        units = [unit for unit in self._known if unit]
        self._steps.append(Traced(units, self._times, self._start, self._end, sum(self._times)))
        self._logits = None

    def _wrap(self, i: int, launch: Launch) -> Launch:
        node = self._program.nodes[i]

        def run(values: Values) -> None:
            unknown = self._known[i] is None
            inputs = [values[slot] for slot in node.sources] if unknown else ()
            start = time.perf_counter()
            launch(values)
            self._times[i] = 1e6 * (time.perf_counter() - start)
            if unknown:
                operands = tuple(_tensor(x, cold) for x, cold in zip(inputs, node.constant, strict=True))
                outputs = tuple(t for slot in node.targets if (t := _tensor(values[slot])))
                self._known[i] = Unit(Site(node.op, node.attributes, operands, outputs), "body")

        return run


def measure(dtype: torch.dtype) -> Ceilings:
    """Reads of memory larger than the caches and one large product, in a thread that ends: torch's OpenMP threads of
    this one would take turns with those of the executor."""
    found: list[Ceilings] = []

    def run() -> None:
        data, side = torch.ones(64 << 20), 1024
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        found.append(Ceilings(data.nbytes / _seconds(data.sum), 2 * side**3 / _seconds(lambda: a @ b)))

    thread = threading.Thread(target=run, name="ingot-ceilings")
    thread.start()
    thread.join()
    return found[0]


def _seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The fastest of `repeats` runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _tensor(value: Any, cold: bool = False) -> Tensor | None:
    if not isinstance(value, torch.Tensor):
        return None
    # a tensor of four axes is a KV pool where attention has one
    return Tensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), cold)


def _processor() -> str:
    """The CPU's name as its maker gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or f"CPU of {os.cpu_count()} cores"
