"""The CPU executor: the graph as a `Program`, with native kernels where the engine has them.

One worker thread runs graph and sampling, so torch's OpenMP pool has one master and steps run in the order they were
launched. Weights are mapped and read from the page cache when they are first used.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from ..engines.dtypes import DTYPES
from ..engines.errors import EngineError
from ..engines.manifest import Manifest
from ..engines.step import FC_BIAS, LOGITS, TOKEN_IDS, TOKENS, hidden_states, k_pages, v_pages
from ..engines.weights import GRAPH_FILE, load_graph, open_weights, random_weights
from ..plugins import native
from ..plugins.interpreter import Program
from ..plugins.paged_attention.trees import with_ancestors
from .batch import Batch
from .capacity import ServeConfig, available_memory, num_kv_pages
from .engine import Engine
from .executor import Logprobs, Result, Sampled, by_work, moved
from .request import SamplingParams
from .sampler import Sampler, top_logprobs
from .speculation.costs import Costs, Curve, scratch_step
from .speculation.draft_engine import DraftEngine
from .speculation.head import HeadEngine, MedusaEngine
from .speculation.pairing import check_drafter

Graph = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, PAGE_SIZE = 64, 512, 16  # what is served if nothing else is asked for


class _Pending:
    """A call on its way through the worker. The lock is held until the worker is done: cheaper than an Event."""

    def __init__(self, call: Callable[[], Any]):
        self.call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.running = threading.Lock()
        self.running.acquire()

    def wait(self) -> Any:
        with self.running:
            if self.error is not None:
                raise self.error
            return self.result


class CpuExecutor:
    """Runs a graph (a `Program`) over its KV pools, `k_pages.i` and `v_pages.i` by name, in a thread of its own.

    drafter: drafts after each step whose batch asks for it.
    """

    costs: Costs | None = None

    def __init__(
        self, graph: Graph, pools: Mapping[str, torch.Tensor], sampler: Sampler, config: ServeConfig,
        drafter: DraftEngine | None = None,
    ):  # fmt: skip
        assert config.max_num_seqs is not None
        self.config = config
        self.num_pages = next(iter(pools.values())).shape[0] if pools else 0
        self.graph = graph
        self._pools = dict(pools)
        self.sampler = sampler
        self.drafter = drafter
        self._last_token = np.zeros(config.max_num_seqs, np.int32)
        self._queue: SimpleQueue[_Pending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ingot-executor", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, engine: Engine, config: ServeConfig) -> CpuExecutor:
        """Maps the weights, binds the graph, allocates the pools. Raises EngineError: too little memory."""
        config = config.with_defaults(MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, PAGE_SIZE)
        assert config.max_num_seqs is not None and config.page_size is not None
        program, num_pages = open_program(engine, config), num_kv_pages(engine.manifest, config)
        sampler = Sampler(config.max_num_seqs, engine.manifest.model.vocab_size)
        drafter = _open_drafter(engine, config, num_pages) if config.draft_engine else None
        found = cls(program, pools(engine.manifest, num_pages, config.page_size), sampler, config, drafter)
        if config.speculate:
            found.measure()
        return found

    def measure(self) -> None:
        """Finds out what steps of decoding cost, up to the largest that drafts can make."""
        config, draft = self.config, self.drafter
        assert config.max_num_seqs and config.max_num_batched_tokens and config.page_size
        most = max(config.num_draft_tokens, config.num_draft_nodes)
        widest = min(config.max_num_batched_tokens, config.max_num_seqs * (1 + most))

        def step(size: int) -> None:
            self.graph(scratch_step(size, 4) | self._pools)

        call = _Pending(
            lambda: Costs(
                Curve.measure(step, widest),
                Curve.measure(draft.time, widest) if draft else None,
                at_once=isinstance(draft, MedusaEngine),
            )  # fmt: skip
        )
        self._queue.put(call)
        self.costs = call.wait()

    def allocate(self, num_bytes: int) -> np.ndarray:
        return np.zeros(num_bytes, np.uint8)

    def check(self, params: SamplingParams, num_stop_ids: int) -> None:
        """Any number of anything."""

    def launch(self, batch: Batch) -> Sampled:
        pending = _Pending(partial(self._run, batch))
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
                    pending.result = pending.call()
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
        if self.drafter:
            self.drafter.follow(batch)
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        outputs = self.graph(inputs | self._pools)
        if self.drafter:
            self.drafter.keep(batch, outputs)
        logits = outputs[LOGITS]  # [R, vocab]

        prompt_logprobs: list[list[Logprobs] | None] | None = [None] * batch.num_works if batch.scored else None
        for work, begin, token_ids, num in batch.scored:
            rows = logits[begin : begin + len(token_ids)]
            assert prompt_logprobs is not None
            prompt_logprobs[work] = top_logprobs(rows, torch.from_numpy(token_ids), np.full(len(token_ids), num))
        if not len(batch.sample_index):
            return Result([[] for _ in range(batch.num_works)], None, prompt_logprobs)
        if len(batch.sample_index) != logits.shape[0]:
            logits = logits[torch.from_numpy(batch.sample_index)]
        tokens, found = self.sampler.sample(
            logits, batch.sample_rows, batch.sample_positions, batch.masks, batch.drafts, batch.nodes
        )
        if batch.nodes is not None:
            self._move(batch, tokens)
        self._last_token[batch.sample_rows] = tokens  # where there are drafts the host knows, and writes, the next one
        drafts = self.drafter.draft(batch, tokens) if self.drafter else None
        return Result(*by_work(batch, tokens.tolist(), found), prompt_logprobs, drafts)

    def _move(self, batch: Batch, tokens: np.ndarray) -> None:
        """The nodes of trees that hold, to the slots of their positions, in everything that lies by slot."""
        _, source, target = moved(batch, tokens)
        if len(source):
            move(self._pools, source, target)
            if self.drafter:
                self.drafter.move(source, target)


def move(pools: Mapping[str, torch.Tensor], source: np.ndarray, target: np.ndarray) -> None:
    """Copies slots [M] of KV pools; a slot may be both a source and a target."""
    index = [torch.from_numpy(slots.astype(np.int64)) for slots in (target, source)]
    for pool in pools.values():
        flat = (pool.view(torch.int8) if pool.itemsize == 1 else pool).flatten(0, 1)  # torch cannot index fp8
        flat.index_copy_(0, index[0], flat[index[1]])


def open_program(engine: Engine, config: ServeConfig) -> Program:
    """The graph of an engine with its weights, and with native kernels where it has them."""
    compiled = engine.folder / engine.manifest.target
    kernels = native.load(compiled)
    binders = kernels.binders if isinstance(kernels, native.Kernels) else None
    graph = load_graph(compiled if (compiled / GRAPH_FILE).exists() else engine.folder)  # lowered, if quantised
    if config.num_draft_nodes:
        with_ancestors(graph)
    weights = random_weights(graph) if config.load_format == "dummy" else open_weights(engine.folder)
    return Program(graph, weights, binders)


def _open_drafter(target: Engine, config: ServeConfig, num_pages: int) -> DraftEngine:
    """The draft engine of `config`. Raises EngineError: none there, of no use for `target`, or too little memory."""
    assert config.draft_engine is not None and config.max_num_seqs and config.max_num_batched_tokens
    assert config.page_size is not None
    engine = Engine.open(config.draft_engine, dummy=config.load_format == "dummy")
    check_drafter(target, engine, config)
    manifest, head, num_slots = engine.manifest, engine.manifest.head, config.page_size * num_pages
    width = len(head.reads) * head.target_hidden_size if head else 0
    dtype = DTYPES[manifest.model.dtype].torch
    needed, available = (manifest.kv_bytes_per_token + width * dtype.itemsize) * num_slots, available_memory()
    if available is not None and needed > available:
        raise EngineError(
            f"The KV pages of the draft engine need {needed / 2**20:.0f} MiB beside the target's {num_pages} pages, but"
            f" {available / 2**20:.0f} MiB of memory are available; give a smaller num_kv_pages."
        )
    options = (
        open_program(engine, config), pools(manifest, num_pages, config.page_size), config.max_num_seqs, num_pages,
        config.page_size, target.manifest.model.vocab_size, config.max_num_batched_tokens, config.num_draft_tokens,
        config.num_draft_nodes,
    )  # fmt: skip
    if head is None:
        return DraftEngine(*options)
    weights = {} if config.load_format == "dummy" else open_weights(engine.folder)
    return (MedusaEngine if head.kind == "medusa" else HeadEngine)(
        *options, states=_zeros((num_slots, width), dtype), reads=list(map(hidden_states, head.reads)),
        token_ids=weights[TOKEN_IDS].numpy() if weights else np.arange(manifest.model.vocab_size, dtype=np.int32),
        hidden_size=manifest.model.hidden_size, bias=weights.get(FC_BIAS) if head.kind == "eagle3" else None,
    )  # fmt: skip


def pools(manifest: Manifest, num_pages: int, page_size: int) -> dict[str, torch.Tensor]:
    """Fresh KV pools by their input names, zeros: [num_pages, page_size, kv_heads, head_dim] for each layer."""
    pools = {}
    for i, layer in enumerate(manifest.kv_layers):
        dtype = manifest.kv_dtype(layer).torch
        for name, dim in ((k_pages(i), layer.head_dim), (v_pages(i), layer.v_head_dim)):
            pools[name] = _zeros((num_pages, page_size, layer.kv_heads, dim), dtype)
    return pools


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The memory is the system's zero pages, taken when first written. torch.zeros would write it now, and in this
    thread: an OpenMP pool more than there are CPUs makes libgomp put its threads to sleep between kernels instead
    of letting them spin, which costs a third of the speed.
    """
    memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
