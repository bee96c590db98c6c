"""`EngineProcess`: what `AsyncLLM` is, with the engine in a process of its own that is replaced when it fails.

Prompts become tokens here, tokens become text there, and answers are put together here as they come. When the engine
process goes, a request of which nothing has been handed out is asked again, once, with the same seed; the others fail.
Everything happens in one event loop, so nothing is locked; invariant: an open request always has an end to wait for.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ...engines.errors import EngineError, RequestError, shown
from ..capacity import ServeConfig
from ..metrics import Metrics
from ..prompt import Limits, Prompt, tokens_of
from ..request import RequestOutput, SamplingParams
from ..text import Text
from .channel import Cancel, FromEngine, Measure, News, Ready, Refused, Snapshot
from .pending import Pending
from .supervisor import Supervisor

LONG_PROMPT = 2048  # characters, or token ids, from which a thread tokenises and checks: some 0.5 ms of work
_HIGHEST = (1 << 63) - 1  # priority; the channel carries no wider integer


class EngineProcess:
    """An engine directory, open for streaming in another process. `options` are those of `LLM`.

    watchdog: seconds without a step after which the engine hangs and is replaced. start_timeout: seconds that opening
    it may take. patience: seconds that a request waits for a new engine process before it fails. longest_pause: seconds
    that the words of a stream may wait for more where many are open, see service.py.
    Use it with `async with`, or `start` and `close`; what it says of the engine is known from then on.
    """

    def __init__(
        self,
        engine: str | os.PathLike,
        *,
        watchdog: float = 60.0,
        start_timeout: float = 600.0,
        patience: float = 30.0,
        longest_pause: float = 0.0,
        **options: Any,
    ):
        self._folder = Path(engine).resolve()
        self._options = asdict(ServeConfig(**options))
        self._watchdog, self._start_timeout, self._patience = watchdog, start_timeout, patience
        self._longest_pause = longest_pause
        self._supervisor: Supervisor | None = None
        self._ready: Ready | None = None
        self._text: Text | None = None
        self._metrics: Metrics | None = None
        self._measures: dict[int, asyncio.Event] = {}  # by the number of what was asked
        self._numbers = itertools.count(1)
        self._open: dict[int, Pending] = {}
        self._ids: dict[str, Pending] = {}
        self._closing: asyncio.Task[None] | None = None

    # -- opening and closing -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine process. Raises EngineError as `LLM` does; nothing is left running then."""
        self._supervisor = self._supervised()
        text = asyncio.create_task(asyncio.to_thread(Text.open, self._folder))
        text.add_done_callback(lambda task: task.cancelled() or task.exception())  # of no interest if nobody asks
        try:
            self._ready = await self._supervisor.start()
            self._text = await text
        except BaseException:
            text.cancel()
            await self.close()
            raise
        self._metrics = self._ready.metrics

    def _supervised(self) -> Any:
        """What keeps the engine process: a Supervisor, or what looks like one (link.py)."""
        return Supervisor(
            self._folder, self._options, self._hear, self._lost, self._watchdog, self._start_timeout,
            self._longest_pause,
        )  # fmt: skip

    async def close(self) -> None:
        """End the engine process, by force if it does not end by itself; open requests end with "abort"."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for request in self._open.values():
            request.abort()
        if self._supervisor is not None:
            await self._supervisor.close()

    async def __aenter__(self) -> EngineProcess:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- what is known of the engine -----------------------------------------------------------------------------------

    @property
    def ready(self) -> Ready:
        """What the engine process said of itself when it was first open; sizes of a later one can differ."""
        if self._ready is None:
            raise EngineError("The engine process has not been started; use `async with`, or start it.")
        return self._ready

    @property
    def text(self) -> Text | None:
        """Tokenizer, chat template and decoder; None where the engine has no tokenizer."""
        return self._text

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.ready.vocab_size

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have, its answer included."""
        return self.ready.max_model_len

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose keys and values the pool holds."""
        return self.ready.num_kv_tokens

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at a time."""
        return self.ready.max_num_seqs

    def default_params(self) -> SamplingParams:
        """Sampling as the model's generation_config.json suggests."""
        return SamplingParams(**self.ready.default_params)

    # -- how it is doing -----------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """An engine process is open, and answers."""
        return self._supervisor is not None and self._supervisor.child is not None

    @property
    def gave_up(self) -> bool:
        """No engine process is open, and none will be started."""
        return self._supervisor is not None and self._supervisor.gave_up

    @property
    def restarts(self) -> int:
        """Times that an engine process was started in place of another."""
        return 0 if self._supervisor is None else self._supervisor.restarts

    @property
    def pid(self) -> int | None:
        """The engine process's; None while there is none."""
        child = None if self._supervisor is None else self._supervisor.child
        return child.pid if child is not None else None

    def check(self) -> None:
        """Raises EngineError with the reason unless the engine is healthy."""
        if self._supervisor is None or self._ready is None:
            raise EngineError("The engine process has not been started; use `async with`, or start it.")
        if not self.healthy:
            raise EngineError(self._supervisor.down)

    def metrics(self) -> Metrics:
        """The last snapshot that came: half a second old at most while the engine works. Counts are since its start."""
        if self._metrics is None:
            self.check()
        assert self._metrics is not None
        return replace(self._metrics, healthy=self.healthy)

    async def measure(self) -> Metrics:
        """A new snapshot, if the engine gives one within a second; else the last."""
        child = None if self._supervisor is None else self._supervisor.child
        if child is not None:
            number = next(self._numbers)
            answered = self._measures[number] = asyncio.Event()
            child.send(Measure(number))
            try:
                await asyncio.wait_for(answered.wait(), 1.0)
            except TimeoutError:
                pass
            finally:
                del self._measures[number]
        return self.metrics()

    # -- requests ------------------------------------------------------------------------------------------------------

    def cancel(self, request_id: str) -> None:
        """End a request: its consumer gets what there is, with finish_reason "abort". An unknown id is ignored."""
        request = self._ids.get(request_id)
        if request is not None:
            request.cancelled = True
            if not self._tell_cancelled(request):
                request.abort()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deltas: bool = False,
    ) -> AsyncIterator[RequestOutput]:
        """The answer to one prompt as it grows: all of it each time, or with `deltas` only what is new.

        Raises RequestError, at the first step of the iteration, and EngineError if the engine fails after something
        was handed out, or a second time, or is not back in time.
        """
        params = sampling_params or self.default_params()
        limits = self._checked(params, priority)
        number = next(self._numbers)
        name = str(number) if request_id is None else request_id
        if name in self._ids:
            raise RequestError(f"Request id {name!r} is in use; give each open request its own.")
        request = Pending(number, name, params, int(priority))
        self._open[number] = self._ids[name] = request
        try:
            request.prompt, request.prompt_token_ids = await self._tokens(prompt, limits)
            await self._submit(request)
            finished = False
            while not finished:
                await request.news.wait()
                request.news.clear()
                if request.error is not None:
                    raise request.error
                if request.lost is not None and not request.finished:
                    await self._submit_again(request, request.lost)
                    continue
                output = request.output(deltas)
                yield output
                finished = output.finished
        finally:
            del self._open[number], self._ids[name]
            if not request.finished and request.error is None:
                self._tell_cancelled(request)

    def _checked(self, params: SamplingParams, priority: int) -> Limits:
        """What can be checked here, so that the channel carries only what the engine process can read."""
        if self._ready is None or self._closing is not None:
            self.check()
        limits = Limits(self.vocab_size, self.max_model_len, self.num_kv_tokens)
        if not isinstance(params, SamplingParams):
            raise RequestError(f"The sampling parameters are {shown(params)}; they must be a SamplingParams.")
        if not isinstance(priority, int) or abs(priority) > _HIGHEST:
            raise RequestError(
                f"priority is {shown(priority)}; it must be an integer of 64 bits, the lowest is served first."
            )
        params.check_vocabulary(limits.vocab_size)
        return limits

    async def _tokens(self, prompt: Prompt, limits: Limits) -> tuple[str | None, list[int]]:
        words: Any = prompt
        if isinstance(prompt, Mapping):
            words = prompt.get("prompt_token_ids") or prompt.get("prompt")
        long = isinstance(words, Sequence) and len(words) >= LONG_PROMPT
        if long:
            return await asyncio.to_thread(tokens_of, prompt, self._text, limits)
        return tokens_of(prompt, self._text, limits)

    async def _submit(self, request: Pending) -> None:
        assert self._supervisor is not None
        try:
            child = await self._supervisor.wait(self._patience)
        except EngineError:
            if request.finished:  # cancelled meanwhile
                return
            raise
        if not request.finished:
            child.send(request.submit())
            request.sent_to = child

    async def _submit_again(self, request: Pending, why: str) -> None:
        if request.handed_out or request.asked_again:
            raise EngineError(why)
        request.begin_again()
        await self._submit(request)

    def _tell_cancelled(self, request: Pending) -> bool:
        """Whether there is an engine process that knows the request."""
        child = None if self._supervisor is None else self._supervisor.child
        if child is None or request.sent_to is not child:
            return False
        child.send(Cancel(request.number))
        return True

    # -- what the engine process says ----------------------------------------------------------------------------------

    def _hear(self, message: FromEngine) -> None:
        match message:
            case News():
                for update in message.updates:
                    if request := self._open.get(update.number):
                        request.take(update)
            case Refused():
                if request := self._open.get(message.number):
                    request.fail(RequestError(message.why))
            case Snapshot():
                self._metrics = message.metrics
                for number, answered in self._measures.items():
                    if number <= message.answers:
                        answered.set()

    def _lost(self, why: str) -> None:
        """The engine process is gone, and with it what it was asked."""
        for request in self._open.values():
            request.lose(why)
