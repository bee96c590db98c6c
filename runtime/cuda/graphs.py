"""The plan's buckets as CUDA graphs: each sequence of parts is captured when it is first needed.

Kernels of a part may start while the ones before them end (`plugins/pdl.py`); a part starts when the one before it is
done, so that its kernels can rely on all of that: step tensors above all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...engines.plan import Argument, Bucket, Gemm, Launch, Plan
from ...plugins.cublas import load_product
from ...plugins.gpu import Address, Gpu, Launchable


class Replays(Protocol):
    """Parts of buckets as graphs."""

    def capture(self, bucket: int, *parts: str) -> Any: ...

    def replay(self, bucket: int, *parts: str) -> None: ...


class Graphs:
    """Replays parts of buckets on one stream.

    folder: the plan's. weights, buffers: addresses by name; `buffers` may grow until a launch names a new one.
    """

    def __init__(
        self, gpu: Gpu, plan: Plan, folder: Path, weights: Mapping[str, int], buffers: Mapping[str, int], arena: int,
        stream: int,
    ):  # fmt: skip
        self._gpu, self._plan, self._stream, self._arena = gpu, plan, stream, arena
        self._addresses = {"weight": weights, "input": buffers}
        self._folder = folder
        self._functions: dict[int, Launchable] = {}
        self._graphs: dict[tuple[int, tuple[str, ...]], Any] = {}

    def replay(self, bucket: int, *parts: str) -> None:
        """Enqueues these parts of a bucket, in order."""
        self._gpu.replay(self.capture(bucket, *parts), self._stream)

    def capture(self, bucket: int, *parts: str) -> Any:
        """The graph of these parts."""
        graph = self._graphs.get((bucket, parts))
        if graph is None:
            self.load(bucket, *parts)
            graph = self._gpu.capture(lambda: self.enqueue(bucket, *parts), self._stream)
            self._graphs[bucket, parts] = graph
        return graph

    def load(self, bucket: int, *parts: str) -> None:
        """Loads what these parts launch, for loading cannot be captured."""
        for part in parts:
            for launch in self._plan.buckets[bucket].parts[part]:
                self._load(launch)

    def enqueue(self, bucket: int, *parts: str) -> None:
        """Launches these parts one by one; what they launch is loaded."""
        for part in parts:
            for i, launch in enumerate(self._plan.buckets[bucket].parts[part]):
                self._functions[launch.cubin].launch(launch.grid, self._stream, self._arguments(launch), apart=i == 0)

    def _arguments(self, launch: Launch) -> list[int | float | Address]:
        return [self._resolve(a) if isinstance(a, Argument) else a for a in launch.arguments]

    def _resolve(self, argument: Argument) -> Address:
        if argument.kind == "arena":
            return Address(self._arena + argument.offset)
        return Address(self._addresses[argument.kind][argument.name] + argument.offset)

    def _load(self, launch: Launch) -> None:
        if launch.cubin in self._functions:
            return
        binary = self._plan.cubins[launch.cubin]
        if isinstance(binary, Gemm):
            product = load_product(binary)
            product.launch(launch.grid, self._stream, self._arguments(launch))  # cuBLASLt loads its kernels when asked
            self._functions[launch.cubin] = product
        else:
            data = (self._folder / binary.file).read_bytes()
            self._functions[launch.cubin] = self._gpu.load(
                data, binary.symbol, binary.num_warps, binary.shared, binary.pdl
            )


def arena_bytes(plan: Plan) -> int:
    """One arena serves every bucket: steps run one after the other."""
    return max(bucket.arena for bucket in plan.buckets)


def logits_of(bucket: Bucket, arena: int) -> int:
    """Address of the logits that the bucket's head leaves."""
    return arena + bucket.logits
