"""The CPU executor: the graph as a `Program`, with native kernels where the engine has them.

One worker thread runs graph and sampling, so torch's OpenMP pool has one master and steps run in the order they were
launched. Weights are mapped and read from the page cache when they are first used.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue

import numpy as np
import torch

from ..engines.manifest import Manifest
from ..engines.step import LOGITS, TOKENS, k_pages, v_pages
from ..engines.weights import GRAPH_FILE, load_graph, open_weights, random_weights
from ..plugins import native
from ..plugins.interpreter import Program
from .batch import Batch
from .capacity import ServeConfig, num_kv_pages
from .engine import Engine
from .executor import Logprobs, Result, Sampled, by_work
from .request import SamplingParams
from .sampler import Sampler, top_logprobs

Graph = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, PAGE_SIZE = 64, 512, 16  # what is served if nothing else is asked for


class _Pending:
    """A step on its way through the worker. The lock is held until the worker is done: cheaper than an Event."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.running = threading.Lock()
        self.running.acquire()

    def wait(self) -> Result:
        with self.running:
            if self.error is not None:
                raise self.error
            assert self.result is not None
            return self.result


class CpuExecutor:
    """Runs a graph (a `Program`) over its KV pools, `k_pages.i` and `v_pages.i` by name, in a thread of its own."""

    def __init__(self, graph: Graph, pools: Mapping[str, torch.Tensor], sampler: Sampler, config: ServeConfig):
        assert config.max_num_seqs is not None
        self.config = config
        self.num_pages = next(iter(pools.values())).shape[0] if pools else 0
        self.graph = graph
        self._pools = dict(pools)
        self.sampler = sampler
        self._last_token = np.zeros(config.max_num_seqs, np.int32)
        self._queue: SimpleQueue[_Pending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ingot-executor", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, engine: Engine, config: ServeConfig) -> CpuExecutor:
        """Maps the weights, binds the graph, allocates the pools. Raises EngineError: too little memory."""
        config = config.with_defaults(MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, PAGE_SIZE)
        assert config.max_num_seqs is not None and config.page_size is not None
        compiled = engine.folder / engine.manifest.target
        kernels = native.load(compiled)
        binders = kernels.binders if isinstance(kernels, native.Kernels) else None
        graph = load_graph(compiled if (compiled / GRAPH_FILE).exists() else engine.folder)  # lowered, if quantised
        weights = random_weights(graph) if config.load_format == "dummy" else open_weights(engine.folder)
        program = Program(graph, weights, binders)
        sampler = Sampler(config.max_num_seqs, engine.manifest.model.vocab_size)
        return cls(program, pools(engine.manifest, num_kv_pages(engine.manifest, config), config.page_size), sampler,
                   config)  # fmt: skip

    def allocate(self, num_bytes: int) -> np.ndarray:
        return np.zeros(num_bytes, np.uint8)

    def check(self, params: SamplingParams, num_stop_ids: int) -> None:
        """Any number of anything."""

    def launch(self, batch: Batch) -> Sampled:
        pending = _Pending(batch)
        self._queue.put(pending)
        return pending

    def close(self) -> None:
        """Ends the worker after the steps already launched."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        with torch.inference_mode():
            while (pending := self._queue.get()) is not None:
                try:
                    pending.result = self._run(pending.batch)
                except BaseException as error:  # handed to whoever waits: a step never disappears
                    pending.error = error
                finally:
                    pending.running.release()

    def _run(self, batch: Batch) -> Result:
        tokens = batch.inputs[TOKENS]
        in_flight = np.flatnonzero(tokens < 0)
        tokens[in_flight] = self._last_token[-1 - tokens[in_flight]]
        for placement in batch.placements:
            self.sampler.place(placement)
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        logits = self.graph(inputs | self._pools)[LOGITS]  # [R, vocab]

        prompt_logprobs: list[list[Logprobs] | None] | None = [None] * batch.num_works if batch.scored else None
        for work, begin, token_ids, num in batch.scored:
            rows = logits[begin : begin + len(token_ids)]
            assert prompt_logprobs is not None
            prompt_logprobs[work] = top_logprobs(rows, torch.from_numpy(token_ids), np.full(len(token_ids), num))
        if not len(batch.sample_index):
            return Result([[] for _ in range(batch.num_works)], None, prompt_logprobs)
        if len(batch.sample_index) != logits.shape[0]:
            logits = logits[torch.from_numpy(batch.sample_index)]
        tokens, found = self.sampler.sample(logits, batch.sample_rows, batch.sample_positions, batch.masks)
        self._last_token[batch.sample_rows] = tokens
        return Result(*by_work(batch, tokens.tolist(), found), prompt_logprobs)


def pools(manifest: Manifest, num_pages: int, page_size: int) -> dict[str, torch.Tensor]:
    """Fresh KV pools by their input names, zeros: [num_pages, page_size, kv_heads, head_dim] for each layer.

    The memory is the system's zero pages, taken when first written. torch.zeros would write it now, and in this
    thread: an OpenMP pool more than there are CPUs makes libgomp put its threads to sleep between kernels instead
    of letting them spin, which costs a third of the speed.
    """
    pools = {}
    for i, layer in enumerate(manifest.kv_layers):
        dtype = manifest.kv_dtype(layer).torch
        for name, dim in ((k_pages(i), layer.head_dim), (v_pages(i), layer.v_head_dim)):
            shape = (num_pages, page_size, layer.kv_heads, dim)
            memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
            pools[name] = torch.from_numpy(memory).view(dtype).view(shape)
    return pools
