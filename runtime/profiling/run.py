"""Profiles of an engine under several loads: first without a profiler, for the step's real time, then with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ...engines.dtypes import DTYPES
from ...engines.errors import RequestError
from ...engines.manifest import Manifest
from ..capacity import ServeConfig
from ..session import Session
from .floor import Ceilings, Load
from .report import Report
from .table import Profile, Traced, summarise
from .workload import Watched, Workload, watched

BATCHES, PROMPTS = (1, 64, 256), (1024,)  # as far as the engine holds them
NUM_PROMPTS = 8  # prompts of a length, counted


class Tracer(Protocol):
    """Records what a target runs in a step."""

    device: str
    ceilings: Ceilings

    def bucket(self, load: Load) -> int: ...

    def record(self, session: Session) -> AbstractContextManager[None]: ...

    def traced(self, steps: Sequence[Watched]) -> Sequence[Traced | None]: ...


def profile(
    engine: Path,
    config: ServeConfig,
    *,
    batches: Sequence[int] = (),
    context: int = 200,
    prompts: Sequence[int] | None = None,
    num_steps: int = 30,
    seed: int = 0,
    on_done: Callable[[str], None] = lambda title: None,
) -> Report:
    """Steps that decode `batches` sequences of about `context` keys, and steps of one prompt of `prompts` tokens.

    Nothing given: `BATCHES` and `PROMPTS` as far as the engine holds them, at least the most it does. `on_done` gets
    the title of each load that is profiled. Raises EngineError and RequestError.
    """
    tracer = open_tracer(engine)
    session = Session(engine, replace(config, prefix_cache=False))  # the same prompts come twice
    try:
        served = session.executor.config
        assert served.max_num_seqs and served.max_num_batched_tokens
        longest = min(served.max_num_batched_tokens, session.limits.max_model_len - 1)
        batches = batches or _within(BATCHES, served.max_num_seqs)
        prompts = _within(PROMPTS, longest) if prompts is None else prompts
        if short := [length for length in prompts if not 1 < length <= longest]:
            raise RequestError(
                f"a step with a prompt of {short[0]} tokens was asked for; a step of this engine can have a prompt of "
                f"2 to {longest} tokens."
            )
        loads = [Workload(batch, batch, context, num_steps) for batch in batches]
        loads += [Workload(1, length, length, NUM_PROMPTS) for length in prompts]
        plain = []
        for load in loads:
            with watched(session.executor) as watch:
                load.run(session, seed)
            plain.append(watch.steps)
        profiles: list[Profile] = []
        for load, steps in zip(loads, plain, strict=True):
            with watched(session.executor) as watch, tracer.record(session):
                load.run(session, seed)
            bucket = tracer.bucket(watch.steps[load.steady(watch.steps)[0]].load)
            profiles.append(summarise(load, steps, watch.steps, tracer.traced(watch.steps), tracer.ceilings, bucket))
            on_done(profiles[-1].title)
        return Report(str(engine), tracer.device, tracer.ceilings, tuple(profiles))
    finally:
        session.close()


def open_tracer(engine: Path) -> Tracer:
    """The tracer of the engine's target; measures the machine's ceilings. To be opened before the engine is."""
    manifest = Manifest.open(engine, verify=False)
    dtype = DTYPES[manifest.model.dtype].torch
    if manifest.target == "cuda":
        from .cuda import CudaTracer

        return CudaTracer(engine, dtype)
    from .cpu import CpuTracer

    return CpuTracer(dtype)


def _within(sizes: Sequence[int], most: int) -> list[int]:
    """Those of at most `most`, and `most` itself in the place of those that are larger."""
    return list(dict.fromkeys(min(size, most) for size in sizes))
