"""Runs batches. `launch` returns at once; `Sampled.wait` gives the step's tokens.

The token sampled last in each row stays where the steps run (`last_token`), so a step can be launched before the host
has seen the tokens it continues. `open_executor` picks the executor of an engine's target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..engines.errors import EngineError
from ..engines.step import LOGIT_ROWS, SLOTS
from .batch import Batch
from .capacity import ServeConfig
from .engine import Engine
from .request import Logprob, SamplingParams
from .speculation.costs import Costs
from .speculation.verify import holding, moves

Logprobs = dict[int, Logprob]


class Result(NamedTuple):
    """What a step gave, one entry per work, as `Scheduler.commit` takes it."""

    tokens: list[list[int]]
    logprobs: list[list[Logprobs] | None] | None = None
    prompt_logprobs: list[list[Logprobs] | None] | None = None
    drafts: Sequence[Sequence[int]] | None = None  # where the executor drafts: guesses of the tokens that follow


class Sampled(Protocol):
    """A launched step."""

    def wait(self) -> Result:
        """Blocks until the step is done; raises what it raised."""
        ...


class Executor(Protocol):
    """Where steps run. Steps take effect in the order of their launches.

    config: what was asked for with the target's defaults filled in. num_pages: of the KV pool, the scratch page too.
    costs: of steps, measured where drafts are to be verified.
    """

    config: ServeConfig
    num_pages: int
    costs: Costs | None

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
    if engine.manifest.target == "tensorrt":
        if config.speculate is not None:
            raise EngineError(
                f"speculate is {config.speculate!r}, but {engine.folder} is an engine for the tensorrt target, which"
                " cannot verify drafts; leave it out, or build the engine for the cuda target."
            )
        from .tensorrt.executor import TensorRTExecutor

        return TensorRTExecutor(engine, config)
    from .cpu import CpuExecutor

    return CpuExecutor.open(engine, config)


def moved(batch: Batch, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a step with trees, where `tokens` [N] were sampled, left elsewhere than a chain would have: works, slots
    from and slots to [M] of the drafts that hold."""
    assert batch.nodes is not None
    pairs = moves(holding(tokens, batch.drafts, batch.nodes), batch.nodes)
    source, target = (batch.inputs[SLOTS][batch.inputs[LOGIT_ROWS][batch.sample_index[each]]] for each in pairs)
    return batch.sample_works[pairs[0]], source, target


def by_work(
    batch: Batch, tokens: list[int], found: list[Logprobs | None] | None
) -> tuple[list[list[int]], list[list[Logprobs] | None] | None]:
    """Spreads the sampled tokens over the works; those that sample nothing get an empty list.

    Where there were drafts, a work gets those samples that hold.
    """
    if batch.drafts is None and found is None and len(tokens) == batch.num_works:
        return [[token] for token in tokens], None
    works = batch.sample_works.tolist()
    samples: Sequence[int] = range(len(tokens))
    if batch.drafts is not None:
        samples = np.flatnonzero(holding(np.array(tokens), batch.drafts, batch.nodes)).tolist()
    spread: list[list[int]] = [[] for _ in range(batch.num_works)]
    for i in samples:
        spread[works[i]].append(tokens[i])
    logprobs: list[list[Logprobs] | None] | None = None
    if found is not None:
        logprobs = [None] * batch.num_works
        for i in samples:
            if (entry := found[i]) is not None:
                logprobs[works[i]] = [*(logprobs[works[i]] or ()), entry]
    return spread, logprobs
