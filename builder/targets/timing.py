"""Times tactics on the GPU as they will run: in a CUDA graph, weights and KV pages out of the caches.

Operands hold random numbers (zeros would run faster than any model does), step tensors a plausible step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...engines.dtypes import DTYPES
from ...plugins.cublas import load_product
from ...plugins.gpu import Address, Gpu, Launchable
from ...plugins.tactic import Operand, Site, Tactic, Tensor
from .cubin import Binary, Cubin, Source
from .operands import Operands
from .steps import Step, steps

REPLAYS = 5
GRAPH_MS = 2.0  # a graph runs at least this long, within the bounds below
FEWEST, MOST = 3, 24  # launches of the tactic in a graph
LOAD_MS = 25.0  # under load each tactic runs so long at a time, ROUNDS times in turn with the others
ROUNDS = 4
SAMPLE = 1 << 20  # bytes of an output that are compared: all, or whole rows at equal distances


class Timer:
    """A stream, two events and one region of random numbers, from which all operands are cut."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self._stream = gpu.stream()
        self._start, self._end = gpu.event(timed=True), gpu.event(timed=True)
        self._functions: dict[Source, Launchable] = {}
        self._pinned = gpu.pinned(64 << 20)
        self._noise = np.zeros(0, np.uint8)
        self._size = 0
        self._region = 0
        self._zeros = (0, 0)  # address, bytes
        self._generator = np.random.default_rng(0)

    def __enter__(self) -> Timer:
        return self

    def __exit__(self, *_: object) -> None:
        for address in filter(None, (self._region, self._zeros[0])):
            self.gpu.free(address)

    def microseconds(self, site: Site, tactic: Tactic, cubins: Mapping[Source, Binary]) -> float:
        """The time of one run of the tactic: over several steps the geometric mean, so that each counts the same."""
        return statistics.geometric_mean(self.on_step(site, tactic, cubins, step) for step in steps(site))

    def on_step(self, site: Site, tactic: Tactic, cubins: Mapping[Source, Binary], step: Step | None) -> float:
        """Microseconds of one run on `step`, launch gaps included: median over replays of a graph."""
        graph, times = self._graph(site, tactic, cubins, step)
        found = [self._replay(graph) for _ in range(REPLAYS + 1)][1:]
        self.gpu.discard(graph)
        return 1000 * statistics.median(found) / times

    def under_load(self, site: Site, runs: Sequence[tuple[Tactic, Mapping[Source, Binary]]]) -> list[float]:
        """The same for several tactics that run in turn without a pause, as a step of many long launches does.

        A GPU at its limit of power lowers its clock, and less for a tactic that gets along with less of it.
        """
        workspace, zeros = (max(sizes) for sizes in zip(*((t.workspace, t.zeros) for t, _ in runs), strict=True))
        self._reserve_zeros(zeros)
        found = []
        for step in steps(site):
            graphs = [self._graph(site, *run, step, workspace) for run in runs]
            replays = [max(1, round(LOAD_MS / self._replay(graph))) for graph, _ in graphs]
            rounds = [
                [self._replay(graph, many) / times for (graph, times), many in zip(graphs, replays, strict=True)]
                for _ in range(ROUNDS + 1)
            ]
            for graph, _ in graphs:
                self.gpu.discard(graph)
            found.append([1000 * statistics.median(each) for each in zip(*rounds[1:], strict=True)])
        return [statistics.geometric_mean(each) for each in zip(*found, strict=True)]

    def outputs(
        self, site: Site, runs: Sequence[tuple[Tactic, Mapping[Source, Binary]]], step: Step | None
    ) -> list[list[np.ndarray]]:
        """What each tactic leaves in each of the site's outputs, [rows, columns], where all find the same.

        Operands hold numbers for which no part of the result is lost in another. Outputs and workspace hold none
        (all bits are set), so what a kernel does not write differs from what it ought to. Rows are those of the step's
        tokens, of a large output some. Pools, which attention writes into, are seen only as it reads them.
        """
        operands = Operands(site, max(tactic.workspace for tactic, _ in runs), step)
        num_bytes, zeros = operands.fixed_bytes + operands.cold_bytes, max(tactic.zeros for tactic, _ in runs)
        self._reserve(num_bytes)
        self._reserve_zeros(zeros)
        for offset, size, pattern in operands.numbers():
            self._spread(self._region + offset, size, pattern)
        for offset, array in operands.arrays(np.random.default_rng(0)):
            self._write(self._region + offset, array)
        num_tokens = sum(step.queries) if step else None
        found = []
        for tactic, cubins in runs:
            for offset, size in operands.written():
                self.gpu.fill(self._region + offset, size, 0xFF, self._stream)
            if zeros:
                self.gpu.fill(self._zeros[0], zeros, 0, self._stream)
            self._run(tactic, cubins, operands, 0)
            addresses = [self._region + operands.offset(Operand("output", i), 0) for i in range(len(site.outputs))]
            found.append([self._read(*each, num_tokens) for each in zip(addresses, site.outputs, strict=True)])
        self._spread(self._region, num_bytes, self._noise)
        return found

    def _read(self, address: int, tensor: Tensor, num_rows: int | None) -> np.ndarray:
        rows = tensor.shape[0] if num_rows is None else min(num_rows, tensor.shape[0])
        size = tensor.num_bytes // tensor.shape[0]  # bytes of a row
        if rows * size <= SAMPLE:
            self.gpu.download(self._pinned[: rows * size], address, self._stream)
        else:
            picked = np.linspace(0, rows - 1, max(1, SAMPLE // size)).astype(int).tolist()
            for i, row in enumerate(picked):
                self.gpu.download(self._pinned[i * size :][:size], address + row * size, self._stream)
            rows = len(picked)
        self.gpu.synchronise(self._stream)
        return self._pinned[: rows * size].view(DTYPES[tensor.dtype].numpy).reshape(rows, -1).copy()

    def _operands(self, site: Site, workspace: int, step: Step | None) -> tuple[Operands, int]:
        """Room for the operands with what they must hold, and how many copies of the cold ones there are."""
        operands = Operands(site, workspace, step)
        spare = 4 * self.gpu.l2_bytes  # read between two runs on the same copy
        copies = min(MOST, 1 - (-spare // operands.cold_bytes)) if operands.cold_bytes else 1
        self._reserve(operands.fixed_bytes + copies * operands.cold_bytes)
        for offset, array in operands.arrays(self._generator):
            self._write(self._region + offset, array)
        self.gpu.synchronise(self._stream)
        return operands, copies

    def _graph(
        self, site: Site, tactic: Tactic, cubins: Mapping[Source, Binary], step: Step | None, workspace: int = 0
    ) -> tuple[Any, int]:
        """A graph of several runs of the tactic, and how many they are. workspace: bytes, if more than its own."""
        operands, copies = self._operands(site, max(workspace, tactic.workspace), step)
        self._reserve_zeros(tactic.zeros)

        def run(times: int) -> None:
            for i in range(times):
                self._run(tactic, cubins, operands, i % copies)

        run(1)  # what is loaded lazily is loaded now
        one = self.gpu.capture(lambda: run(1), self._stream)
        once = min(self._replay(one) for _ in range(2))
        self.gpu.discard(one)
        times = int(min(MOST, max(FEWEST, GRAPH_MS / max(once, 1e-3))))
        return self.gpu.capture(lambda: run(times), self._stream), times

    def _run(self, tactic: Tactic, cubins: Mapping[Source, Binary], operands: Operands, copy: int) -> None:
        for launch in tactic.launches:
            arguments = [self._address(operands, a, copy) if isinstance(a, Operand) else a for a in launch.arguments]
            function = self._functions.get(launch.kernel)
            if function is None:
                function = self._functions[launch.kernel] = self._load(cubins[launch.kernel])
            function.launch(launch.grid, self._stream, arguments)

    def _address(self, operands: Operands, operand: Operand, copy: int) -> Address:
        if operand.kind == "zeros":
            return Address(self._zeros[0] + operand.index)
        return Address(self._region + operands.offset(operand, copy))

    def _reserve_zeros(self, num_bytes: int) -> None:
        if num_bytes > self._zeros[1]:
            if self._zeros[0]:
                self.gpu.free(self._zeros[0])
            self._zeros = self.gpu.allocate(num_bytes, "counters to time kernels with"), num_bytes
            self.gpu.fill(self._zeros[0], num_bytes, 0, self._stream)

    def _load(self, binary: Binary) -> Launchable:
        if isinstance(binary, Cubin):
            return self.gpu.load(binary.data, binary.name, binary.num_warps, binary.shared, binary.pdl)
        return load_product(binary)

    def _replay(self, graph: Any, replays: int = 1) -> float:
        """Milliseconds of a replay, the mean of some."""
        self.gpu.record(self._start, self._stream)
        for _ in range(replays):
            self.gpu.replay(graph, self._stream)
        self.gpu.record(self._end, self._stream)
        self.gpu.wait(self._end)
        return self.gpu.milliseconds(self._start, self._end) / replays

    def _reserve(self, num_bytes: int) -> None:
        """At least so many bytes of random bf16 numbers of the size that activations and weights have."""
        if num_bytes <= self._size:
            return
        if self._region:
            self.gpu.free(self._region)
        self._size = -(-num_bytes // len(self._pinned)) * len(self._pinned)
        self._region = self.gpu.allocate(self._size, "operands to time kernels with")
        if not len(self._noise):
            some = self._generator.standard_normal(len(self._pinned) // 2, np.float32) * 0.05
            self._noise = some.astype(DTYPES["bfloat16"].numpy).view(np.uint8)
        self._spread(self._region, self._size, self._noise)

    def _spread(self, address: int, num_bytes: int, pattern: np.ndarray) -> None:
        """Fills memory with `pattern`, [n] uint8, again and again."""
        most = len(self._pinned) // len(pattern) * len(pattern)
        some = min(most, num_bytes)
        self._pinned[:some] = pattern[:some] if some <= len(pattern) else np.resize(pattern, some)
        for offset in range(0, num_bytes, most):
            self.gpu.upload(address + offset, self._pinned[: num_bytes - offset][:most], self._stream)
        self.gpu.synchronise(self._stream)

    def _write(self, address: int, array: np.ndarray) -> None:
        data = array.reshape(-1).view(np.uint8)
        self._pinned[: len(data)] = data
        self.gpu.upload(address, self._pinned[: len(data)], self._stream)
        self.gpu.synchronise(self._stream)
