"""A step as CUDA graphs: ingot's kernels spread it and sample, TensorRT's context runs the network between them.

The parts are those of a cuda plan, so that the executor is the same: `stage`, `body` (nothing here), `head` (the whole
network, which may run again for other rows of logits: it writes the same keys and values once more) and `sample.KIND`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...engines.plan import Plan
from ...plugins.gpu import Gpu
from ..cuda.graphs import Graphs
from .network import Network


class StepGraphs:
    """Replays parts of buckets on one stream. own: of what TensorRT has no part in; arena: where the logits are.

    pools: shapes of the KV pools by name. buffers: addresses by name, as `Graphs` takes them.
    """

    def __init__(
        self, gpu: Gpu, plan: Plan, own: Graphs, network: Network, buffers: Mapping[str, int],
        pools: Mapping[str, tuple[int, ...]], arena: int, stream: int,
    ):  # fmt: skip
        self._gpu, self._plan, self._own, self._network, self._stream = gpu, plan, own, network, stream
        self._prepare: Callable[[int], bool] = lambda bucket: network.prepare(
            bucket, plan.buckets[bucket], arena + plan.buckets[bucket].logits, buffers, pools, stream
        )
        self._capturable: dict[int, bool] = {}  # by bucket, of those whose context is there
        self._graphs: dict[tuple[int, tuple[str, ...]], Any] = {}

    def capture(self, bucket: int, *parts: str) -> Any:
        """The graph of these parts; None: TensorRT's part cannot be captured, and is enqueued each time."""
        if (bucket, parts) not in self._graphs:
            self._own.load(bucket, *(part for part in parts if part in self._plan.buckets[bucket].parts))
            if bucket not in self._capturable:
                self._own.load(bucket, "stage")
                self._own.enqueue(bucket, "stage")  # so that what the context reads is a step
                self._capturable[bucket] = self._prepare(bucket)
            graph = None
            if self._capturable[bucket] or "head" not in parts:
                graph = self._gpu.capture(lambda: self._enqueue(bucket, *parts), self._stream)
            self._graphs[bucket, parts] = graph
        return self._graphs[bucket, parts]

    def replay(self, bucket: int, *parts: str) -> None:
        """Enqueues these parts of a bucket, in order."""
        graph = self.capture(bucket, *parts)
        if graph is None:
            self._enqueue(bucket, *parts)
        else:
            self._gpu.replay(graph, self._stream)

    def _enqueue(self, bucket: int, *parts: str) -> None:
        for part in parts:
            if part == "head":
                self._network.enqueue(bucket, self._stream)
            elif part != "body":
                self._own.enqueue(bucket, part)
