"""From checked bodies to the engine and back: prompts encoded, admitted, generated, merged, in time or not at all.

Both kinds of completion run through `Generator.run`, which yields what is new of any prompt. Invariant: however the
iteration ends (finished, an error, a timeout, the client gone), every request of the job has ended in the engine, too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ...engines.errors import RequestError
from ..request import CompletionOutput, Logprob, RequestOutput, SamplingParams
from .answers import CachedTokens, Reason, Usage
from .config import ServerConfig
from .errors import ApiError

INLINE = 1024  # characters: half a millisecond of tokenising, where a hop to a thread and back costs a tenth of one
Result = TypeVar("Result")


@dataclass(frozen=True)
class Encoded:
    """A prompt: its text, if it was one, and its tokens."""

    text: str | None
    ids: Sequence[int]

    @property
    def prompt(self) -> dict[str, Any]:
        return {"prompt": self.text, "prompt_token_ids": self.ids}


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks of the engine. `arrival`: on the event loop's clock, seconds."""

    id: str
    prompts: Sequence[Encoded]
    params: SamplingParams
    priority: int
    arrival: float

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n


@dataclass
class Collected:
    """A choice as it adds up, from the deltas of its answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None

    def add(self, answer: CompletionOutput) -> None:
        self.text += answer.text
        self.token_ids += answer.token_ids
        self.logprobs += answer.logprobs or ()
        self.finish_reason, self.stop_reason = reason_of(answer), answer.stop_reason


class Counted:
    """Tokens of a job, as they come, and whether all have."""

    def __init__(self, job: Job):
        self._num_prompt = sum(len(prompt.ids) for prompt in job.prompts)
        self._cached = [0] * len(job.prompts)
        self._num_output = 0
        self._num_unfinished = len(job.prompts)

    @property
    def complete(self) -> bool:
        """There is no more to come."""
        return not self._num_unfinished

    def add(self, index: int, output: RequestOutput) -> None:
        self._cached[index] = output.num_cached_tokens
        self._num_unfinished -= output.finished
        for answer in output.outputs:
            self._num_output += len(answer.token_ids)

    def usage(self, prompt_only: bool = False) -> Usage:
        num_output = 0 if prompt_only else self._num_output
        return Usage(self._num_prompt, num_output, self._num_prompt + num_output, CachedTokens(sum(self._cached)))


class Generator:
    """Runs jobs on an engine that has AsyncLLM's interface, through `admission`, within the times of `config`."""

    def __init__(self, llm: Any, config: ServerConfig, admission: Any):
        self.llm, self.model, self.max_n = llm, config.model_name, config.max_n
        self._admission = admission
        self._request_timeout, self._queue_timeout = config.request_timeout, config.queue_timeout

    def check_model(self, name: str | None) -> None:
        """Raises ApiError unless it is the model that is served; None is."""
        if name is not None and name != self.model:
            sentence = f"The model {name[:60]!r} does not exist here; this server has {self.model!r}."
            raise ApiError(404, sentence, "model", "model_not_found")

    def params(self, options: dict[str, Any], **more: Any) -> SamplingParams:
        """The model's defaults with a client's options. Raises RequestError."""
        params = replace(self.llm.default_params(), **more, **options)
        if params.n > self.max_n:
            raise RequestError(f"n is {params.n}; this server allows at most {self.max_n}.")
        if params.min_tokens >= self.llm.max_model_len:
            limit = self.llm.max_model_len
            raise RequestError(f"min_tokens is {params.min_tokens}; the context holds {limit}, with the prompt.")
        return params

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises RequestError for what the engine would refuse, so that no prompt of a list starts in vain."""
        limit = self.llm.max_model_len
        if not ids:
            raise RequestError("The prompt is empty; it needs at least one token.")
        if len(ids) >= limit:
            raise RequestError(
                f"The prompt has {len(ids)} tokens; the context holds {limit}, at least one of them new."
            )
        if not 0 <= min(ids) <= max(ids) < self.llm.vocab_size:
            raise RequestError(f"The prompt holds unknown tokens; the model's are 0 to {self.llm.vocab_size - 1}.")

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(prompt, what is new of its answers), as it comes.

        Raises Refused, RequestError, EngineError, and ApiError where time has run out or the engine was closed.
        """
        waiting = set(range(len(job.prompts)))
        num_tokens = sum(len(prompt.ids) for prompt in job.prompts)
        async with (
            self._admission.admit(num_tokens, job.num_choices) as ticket,
            aclosing(self._outputs(job)) as outputs,
        ):
            while found := await self._next(outputs, job, len(waiting) == len(job.prompts)):
                index, output = found
                if index in waiting and any(answer.token_ids for answer in output.outputs):
                    waiting.discard(index)
                    if not waiting:
                        ticket.started()
                if any(answer.finish_reason == "abort" for answer in output.outputs):
                    raise ApiError(503, "The engine was stopped before the answer was complete.", code="unavailable")
                yield index, output

    async def _next(
        self, outputs: AsyncIterator[tuple[int, RequestOutput]], job: Job, queued: bool
    ) -> tuple[int, RequestOutput] | None:
        """The next output, None at the end. A timeout cancels what `outputs` waits for, and so its requests."""
        limits = [(self._request_timeout, "request_timeout", "complete")]
        if queued:
            limits.append((self._queue_timeout, "queue_timeout", "begun"))
        ends = [(seconds, name, what) for seconds, name, what in limits if seconds is not None]
        if not ends:
            return await anext(outputs, None)
        seconds, name, what = min(ends)
        try:
            async with asyncio.timeout_at(job.arrival + seconds):
                return await anext(outputs, None)
        except TimeoutError:
            raise ApiError(504, f"The answer was not {what} within {seconds:g} seconds.", code=name) from None

    async def _outputs(self, job: Job) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Of all prompts, in the order in which they come."""
        unique = secrets.token_hex(4)  # clients may use a request id twice
        streams = [
            self.llm.generate(
                prompt.prompt, job.params, f"{job.id}-{unique}-{i}", priority=job.priority, deltas=True
            )
            for i, prompt in enumerate(job.prompts)
        ]  # fmt: skip
        if len(streams) == 1:
            async with aclosing(streams[0]) as stream:
                async for output in stream:
                    yield 0, output
            return
        # one place: whoever has more to say meanwhile says it at once later
        queue: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue(1)
        tasks = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(streams)]
        try:
            num_open = len(streams)
            while num_open:
                found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                num_open -= found[1].finished
                yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, stream: AsyncGenerator[RequestOutput, None], queue: asyncio.Queue[tuple[int, RequestOutput] | Exception]
) -> None:
    try:
        async with aclosing(stream):
            async for output in stream:
                await queue.put((index, output))
    except Exception as error:
        await queue.put(error)


def reason_of(answer: CompletionOutput) -> Reason | None:
    """OpenAI's reasons; the engine's other two, "abort" and "error", never get here."""
    return "stop" if answer.finish_reason == "stop" else "length" if answer.finish_reason == "length" else None


async def off_loop(num_characters: int, work: Callable[[], Result]) -> Result:
    """`work` on so much text: at once if it is short, otherwise in a thread, while other streams go on."""
    return work() if num_characters <= INLINE else await asyncio.to_thread(work)
