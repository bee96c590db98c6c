"""Runs batches. `launch` returns at once; `Sampled.wait` gives the step's tokens.

The CPU executor has one worker thread for graph and sampling, so torch's OpenMP pool has one master and steps run in
the order they were launched. The token sampled last in each row stays here (`last_token`), so a step can be launched
before the host has seen the tokens it continues.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..engines.step import LOGITS, TOKENS
from .batch import Batch
from .request import Logprob
from .sampler import Sampler, top_logprobs

Logprobs = dict[int, Logprob]
Graph = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class Result(NamedTuple):
    """What a step gave, one entry per work, as `Scheduler.commit` takes it."""

    tokens: list[list[int]]
    logprobs: list[list[Logprobs] | None] | None = None
    prompt_logprobs: list[list[Logprobs] | None] | None = None


class Sampled(Protocol):
    """A launched step."""

    def wait(self) -> Result:
        """Blocks until the step is done; raises what it raised."""
        ...


class Executor(Protocol):
    """Where steps run. Steps take effect in the order of their launches."""

    def launch(self, batch: Batch) -> Sampled: ...

    def close(self) -> None: ...


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
    """Runs a graph (a `Program`) over its KV pools in a thread of its own.

    pools: `k_pages.i` and `v_pages.i` by name. num_rows: rows of the scheduler.
    """

    def __init__(self, graph: Graph, pools: Mapping[str, torch.Tensor], sampler: Sampler, num_rows: int):
        self._graph = graph
        self._pools = dict(pools)
        self._sampler = sampler
        self._last_token = np.zeros(num_rows, np.int32)
        self._queue: SimpleQueue[_Pending | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ingot-executor", daemon=True)
        self._thread.start()

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
        if len(batch.in_flight):
            batch.inputs[TOKENS][batch.in_flight] = self._last_token[batch.in_flight_rows]
        for placement in batch.placements:
            self._sampler.place(placement)
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        logits = self._graph(inputs | self._pools)[LOGITS]  # [R, vocab]

        prompt_logprobs: list[list[Logprobs] | None] | None = [None] * batch.num_works if batch.scored else None
        for work, begin, token_ids, num in batch.scored:
            rows = logits[begin : begin + len(token_ids)]
            assert prompt_logprobs is not None
            prompt_logprobs[work] = top_logprobs(rows, torch.from_numpy(token_ids), np.full(len(token_ids), num))
        if not len(batch.sample_index):
            return Result([[] for _ in range(batch.num_works)], None, prompt_logprobs)
        if len(batch.sample_index) != logits.shape[0]:
            logits = logits[torch.from_numpy(batch.sample_index)]
        tokens, found = self._sampler.sample(logits, batch.sample_rows, batch.sample_positions)
        self._last_token[batch.sample_rows] = tokens
        return Result(*_by_work(batch, tokens.tolist(), found), prompt_logprobs)


def _by_work(
    batch: Batch, tokens: list[int], found: list[Logprobs | None] | None
) -> tuple[list[list[int]], list[list[Logprobs] | None] | None]:
    """Spreads the sampled tokens over the works; those that sample nothing get an empty list."""
    if len(tokens) == batch.num_works:
        spread = [[token] for token in tokens]
    else:
        spread = [[] for _ in range(batch.num_works)]
        for work, token in zip(batch.sample_works.tolist(), tokens, strict=True):
            spread[work] = [token]
    if found is None:
        return spread, None
    logprobs: list[list[Logprobs] | None] = [None] * batch.num_works
    for work, entry in zip(batch.sample_works.tolist(), found, strict=True):
        logprobs[work] = None if entry is None else [entry]
    return spread, logprobs
