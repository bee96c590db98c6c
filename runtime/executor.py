"""Runs batches. `launch` returns at once; `Sampled.wait` gives the step's tokens.

The token sampled last in each row stays where the steps run (`last_token`), so a step can be launched before the host
has seen the tokens it continues. `open_executor` picks the executor of an engine's target.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from .batch import Batch
from .capacity import ServeConfig
from .engine import Engine
from .request import Logprob, SamplingParams

Logprobs = dict[int, Logprob]


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
    """Where steps run. Steps take effect in the order of their launches.

    config: what was asked for with the target's defaults filled in. num_pages: of the KV pool, the scratch page too.
    """

    config: ServeConfig
    num_pages: int

    def allocate(self, num_bytes: int) -> np.ndarray:
        """[num_bytes] uint8 of zeros for an arena, of the kind that steps are read from quickest."""
        ...

    def check(self, params: SamplingParams, num_stop_ids: int) -> None:
        """Raises RequestError for what its sampling cannot honour. num_stop_ids: tokens that may end the request."""
        ...

    def launch(self, batch: Batch) -> Sampled: ...

    def close(self) -> None: ...


def open_executor(engine: Engine, config: ServeConfig) -> Executor:
    """The executor of the engine's target, KV pool allocated. EngineError: it does not fit, or cannot run here."""
    if engine.manifest.target == "cuda":
        from .cuda.executor import CudaExecutor

        return CudaExecutor(engine, config)
    from .cpu import CpuExecutor

    return CpuExecutor.open(engine, config)


def by_work(
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
