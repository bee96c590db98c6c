"""The serving loop under a steady load, watched where it hands a step to the executor and takes its result.

Requests go through a `Session` as any other, so scheduling, overlap and delivery are those of serving. The watch
replaces methods of one executor while it looks, and costs nothing when nobody profiles.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from ...engines.errors import RequestError
from ...engines.step import KV_LEN, LOGIT_ROWS, QUERY_START
from ..batch import Batch
from ..executor import Executor, Result, Sampled
from ..request import SamplingParams
from ..session import Session
from ..stream import Stream
from .floor import Load

SETTLE = 3  # steps of a steady load that are not counted, at its beginning


@dataclass
class Watched:
    """A step as the loop saw it; seconds of `time.perf_counter()`. wait: the time in which the loop waited for it."""

    load: Load
    began: float
    wait: float = 0.0
    done: float = 0.0


class Watch:
    """Stands before an executor and notes its steps, in order."""

    def __init__(self, executor: Executor):
        self.steps: list[Watched] = []
        self._launch = executor.launch

    def launch(self, batch: Batch) -> Sampled:
        began = time.perf_counter()
        starts, keys = batch.inputs[QUERY_START].tolist(), batch.inputs[KV_LEN].tolist()
        queries = tuple(b - a for a, b in zip(starts, starts[1:], strict=False))
        step = Watched(Load(queries, tuple(keys), len(batch.inputs[LOGIT_ROWS]), len(batch.packed)), began)
        self.steps.append(step)
        return _Waited(self._launch(batch), step)


class _Waited:
    def __init__(self, sampled: Sampled, step: Watched):
        self._sampled, self._step = sampled, step

    def wait(self) -> Result:
        began = time.perf_counter()
        result = self._sampled.wait()
        self._step.done = time.perf_counter()
        self._step.wait = self._step.done - began
        return result


@contextmanager
def watched(executor: Executor) -> Iterator[Watch]:
    """The steps of `executor` for the time of a `with` block that begins and ends with nothing in flight."""
    watch = Watch(executor)
    with replaced(executor, "launch", watch.launch):
        yield watch


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """An attribute of one object is another for the time of a `with` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass(frozen=True)
class Workload:
    """A steady load. Decoding: `sequences` at `context` keys each, on average over `num_steps` steps; else prompts of
    `tokens` tokens, one a step."""

    sequences: int
    tokens: int
    context: int
    num_steps: int

    @property
    def decoding(self) -> bool:
        return self.tokens == self.sequences

    def run(self, session: Session, seed: int = 0) -> None:
        """Send it and wait for the answers. Raises RequestError for what the engine cannot hold at a time."""
        rng = random.Random(seed)
        config = session.executor.config
        assert config.max_num_seqs and config.max_num_batched_tokens
        if self.sequences > config.max_num_seqs or self.tokens > config.max_num_batched_tokens:
            raise RequestError(
                f"a step of {self.sequences} sequences and {self.tokens} tokens was asked for, but a step of this "
                f"engine has at most {config.max_num_seqs} and {config.max_num_batched_tokens}; ask for less."
            )

        def prompts(length: int) -> list[list[int]]:
            return [[rng.randrange(session.limits.vocab_size) for _ in range(length)] for _ in range(self.sequences)]

        if not self.decoding:
            for _ in range(SETTLE + self.num_steps):
                _generate(session, prompts(self.tokens), 1)
            return
        length = max(1, self.context - self.num_steps // 2 - SETTLE)
        room = max(1, config.max_num_batched_tokens - self.sequences)
        prefill = 2 + 2 * -(-self.sequences * length // room)  # the first decode while the last are read
        num_tokens = prefill + SETTLE + self.num_steps + 2
        if self.sequences * (length + num_tokens) > session.limits.kv_capacity:
            raise RequestError(
                f"{self.sequences} sequences of {length + num_tokens} tokens were asked for, but the KV pool holds "
                f"{session.limits.kv_capacity} tokens; ask for fewer or for less --context."
            )
        _generate(session, prompts(length), num_tokens)

    def steady(self, steps: Sequence[Watched]) -> list[int]:
        """Places of the `num_steps` steps to count. Raises RequestError if there were none."""
        if self.decoding:
            wanted = (1,) * self.sequences
            found = [i for i, step in enumerate(steps) if step.load.queries == wanted]
            found = found[SETTLE:][: self.num_steps] if len(found) > SETTLE else found
        else:
            found = [i for i, step in enumerate(steps) if step.load.queries == (self.tokens,)][-self.num_steps :]
        if not found:
            raise RequestError(
                f"no step had {self.sequences} sequences of {self.tokens} tokens in all; ask for fewer sequences or "
                "for less --context."
            )
        return found


def _generate(session: Session, prompts: Sequence[list[int]], max_tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    done: SimpleQueue[Stream] = SimpleQueue()

    def listen(changed: list[Stream]) -> None:
        for stream in changed:
            if stream.finished:
                done.put(stream)

    session.submit([session.prepare(prompt, params, listen) for prompt in prompts])
    for _ in prompts:
        stream = done.get()
        if stream.error:
            raise stream.error
