"""Times tactics on the GPU as they will run: in a CUDA graph, weights and KV pages out of the caches.

Operands hold random numbers (zeros would run faster than any model does), step tensors a plausible step.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...plugins.cublas import load_product
from ...plugins.gpu import Address, Gpu, Launchable
from ...plugins.tactic import Operand, Site, Tactic, Tensor
from .cubin import Binary, Cubin, Source

CONTEXTS = 256, 768  # keys of a sequence in a bucket for decoding short contexts
SPREAD = 64  # keys by which sequences differ: equal lengths of whole pages suit some splits better than any real step
LONG = 1 << 17  # keys of all sequences together where contexts may be long
LONGEST = 1 << 15  # keys of one sequence among short ones
SLOTS = {"PagedAttention": 3, "RotaryPagedAttention": 2}  # first of slots, query_start, kv_len, pages, k_pages
ANCESTORS = 9  # inputs behind slots
REPLAYS = 5
GRAPH_MS = 2.0  # a graph runs at least this long, within the bounds below
FEWEST, MOST = 3, 24  # launches of the tactic in a graph
LOAD_MS = 25.0  # under load each tactic runs so long at a time, ROUNDS times in turn with the others
ROUNDS = 4


class Timer:
    """A stream, two events and one region of random numbers, from which all operands are cut."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self._stream = gpu.stream()
        self._start, self._end = gpu.event(timed=True), gpu.event(timed=True)
        self._functions: dict[Source, Launchable] = {}
        self._pinned = gpu.pinned(64 << 20)
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

    def _operands(self, site: Site, workspace: int, step: Step | None) -> tuple[_Operands, int]:
        """Room for the operands with what they must hold, and how many copies of the cold ones there are."""
        operands = _Operands(site, workspace, step)
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
                for launch in tactic.launches:
                    arguments = [
                        self._address(operands, a, i % copies) if isinstance(a, Operand) else a
                        for a in launch.arguments
                    ]
                    function = self._functions.get(launch.kernel)
                    if function is None:
                        function = self._load(cubins[launch.kernel])
                        self._functions[launch.kernel] = function
                    function.launch(launch.grid, self._stream, arguments)

        run(1)  # what is loaded lazily is loaded now
        one = self.gpu.capture(lambda: run(1), self._stream)
        once = min(self._replay(one) for _ in range(2))
        self.gpu.discard(one)
        times = int(min(MOST, max(FEWEST, GRAPH_MS / max(once, 1e-3))))
        return self.gpu.capture(lambda: run(times), self._stream), times

    def _address(self, operands: _Operands, operand: Operand, copy: int) -> Address:
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
        import ml_dtypes

        some = self._generator.standard_normal(len(self._pinned) // 2, np.float32) * 0.05
        self._pinned[:] = some.astype(ml_dtypes.bfloat16).view(np.uint8)
        for offset in range(0, self._size, len(self._pinned)):
            self.gpu.upload(self._region + offset, self._pinned, self._stream)
        self.gpu.synchronise(self._stream)

    def _write(self, address: int, array: np.ndarray) -> None:
        data = array.reshape(-1).view(np.uint8)
        self._pinned[: len(data)] = data
        self.gpu.upload(address, self._pinned[: len(data)], self._stream)
        self.gpu.synchronise(self._stream)


@dataclass(frozen=True)
class Step:
    """What attention is timed on: query tokens of each sequence, and its keys, those of the queries included."""

    queries: tuple[int, ...]
    lengths: tuple[int, ...]

    def num_pages(self, page_size: int) -> int:
        """Pages that the sequences fill, and the first, which nobody reads."""
        return 1 + sum(-(-n // page_size) for n in self.lengths)

    def arrays(self, site: Site) -> dict[int, np.ndarray]:
        """slots, query_start, kv_len and pages by their place among the op's inputs."""
        at, page_size = SLOTS[site.op], _pool(site).shape[1]
        slots_like, table_like = site.inputs[at], site.inputs[at + 3]
        assert slots_like is not None and table_like is not None
        starts = np.concatenate([[0], np.cumsum(self.queries)]).astype(np.int32)
        pages, slots, first = np.zeros(table_like.shape, np.int32), np.zeros(slots_like.shape, np.int32), 1
        for s, length in enumerate(self.lengths):
            count = -(-length // page_size)
            pages[s, :count] = np.arange(first, first + count)
            begin, end = starts[s], starts[s + 1]
            slots[begin:end] = first * page_size + np.arange(length - (end - begin), length)
            first += count
        found = {at: slots, at + 1: starts, at + 2: np.array(self.lengths, np.int32), at + 3: pages}
        if any(site.inputs[at + ANCESTORS :]):  # which the mask costs, whatever it says
            found[at + ANCESTORS] = np.full(slots.shape, -1, np.int32)
        return found


def steps(site: Site) -> list[Step | None]:
    """The steps to time a site on; None where the op reads no step.

    Attention: decode rows of CONTEXTS; where contexts may be long, all of them long, and one long one among short ones;
    the same with some queries of each sequence where drafts are verified; where there may be prompts, one that fills
    the bucket, and one that fills half of it behind a long context and short ones.
    """
    if site.op not in SLOTS:
        return [None]
    table, query = site.inputs[SLOTS[site.op] + 3], site.inputs[0]
    assert table is not None and query is not None
    tokens, (sequences, width) = query.shape[0], table.shape
    longest = min(width * _pool(site).shape[1], site.max_context or LONGEST)
    each = min(tokens, site.max_query // 2 + 1) if site.max_query else 1  # queries: rarely as many as there may be
    num = min(sequences, max(1, tokens // each))

    def lengths_about(context: int) -> tuple[int, ...]:
        return tuple(max(each, min(context, longest) - 29 * i % SPREAD) for i in range(num))

    short = lengths_about(CONTEXTS[0])
    skewed = (longest, *short[1:])
    if site.max_query:
        several = [*map(lengths_about, CONTEXTS)] if site.max_context else [lengths_about(LONG // num), skewed]
        padding = (0,) * (sequences - num)
        return [Step((each,) * num + padding, lengths + padding) for lengths in several]
    half = tokens // 2
    return [_prompts(tokens, longest, sequences), _prompts(half, longest, sequences, skewed[: tokens - half])]


def _prompts(tokens: int, longest: int, sequences: int, decoding: tuple[int, ...] = ()) -> Step:
    """`tokens` of prompts, as few as hold them, behind rows of decoding of these lengths; padded sequences last."""
    counts = [min(longest, tokens - done) for done in range(0, tokens, longest)]
    counts = counts[: max(0, sequences - len(decoding))]
    padding = (0,) * (sequences - len(decoding) - len(counts))
    return Step((1,) * len(decoding) + (*counts, *padding), decoding + (*counts, *padding))


def _pool(site: Site) -> Tensor:
    pool = site.inputs[SLOTS[site.op] + 4]
    assert pool is not None
    return pool


class _Operands:
    """Where the operands of a site lie in the region: fixed ones first, then copies of the cold ones."""

    def __init__(self, site: Site, workspace: int, step: Step | None):
        self._site, self._step = site, step
        num_pages = step.num_pages(_pool(site).shape[1]) if step else 1
        self._at: dict[tuple[str, int], tuple[bool, int]] = {}
        self.fixed_bytes = self.cold_bytes = 0
        for kind, tensors in (("input", site.inputs), ("output", site.outputs)):
            for i, tensor in enumerate(tensors):
                if tensor is None:
                    continue
                size = _aligned(tensor.num_bytes * (num_pages if len(tensor.shape) == 4 else 1))
                if tensor.cold:
                    self._at[kind, i] = True, self.cold_bytes
                    self.cold_bytes += size
                else:
                    self._at[kind, i] = False, self.fixed_bytes
                    self.fixed_bytes += size
        self._workspace = self.fixed_bytes
        self.fixed_bytes += _aligned(workspace)

    def offset(self, operand: Operand, copy: int) -> int:
        if operand.kind == "workspace":
            return self._workspace + operand.index
        cold, offset = self._at[operand.kind, operand.index]
        return (self.fixed_bytes + copy * self.cold_bytes if cold else 0) + offset + operand.offset

    def arrays(self, generator: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        """Integers that the kernels index with, (offset, values)."""
        values: dict[int, np.ndarray] = {}
        if self._step:
            values = self._step.arrays(self._site)
        else:
            most = {"Gather": 0, "Experts": 3}.get(self._site.op)  # the operand whose first axis is indexed
            for i, tensor in enumerate(self._site.inputs):
                if tensor is not None and tensor.dtype in ("int32", "int64"):
                    indexed = None if most is None else self._site.inputs[most]
                    bound = 1024 if indexed is None else indexed.shape[0]
                    values[i] = generator.integers(0, bound, tensor.shape, dtype=tensor.dtype)
        return [(self.offset(Operand("input", i), 0), array) for i, array in values.items()]


def _aligned(num_bytes: int) -> int:
    return -(-max(1, num_bytes) // 256) * 256
