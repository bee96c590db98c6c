"""`AsyncLLM`: the same engine for asyncio, one async stream per request.

The loop's thread wakes the event loop once per step, for all streams that grew in it. A consumer that is slow sees
fewer, longer outputs; one that goes away (break, cancelled task) ends its request within a step.
"""

from __future__ import annotations

import asyncio
import os
import uuid
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from .llm import chat_prompt
from .prompt import Prompt
from .request import RequestOutput, SamplingParams
from .session import Opened
from .stream import Stream
from .text import Message


class AsyncLLM(Opened):
    """An engine directory, open for streaming. Options and errors are those of `LLM`."""

    def __init__(self, engine: str | os.PathLike, **options: Any):
        super().__init__(engine, **options)
        self._finalizer = weakref.finalize(self, self._session.close)
        self._news: dict[Stream, asyncio.Event] = {}  # touched in the event loop's thread only

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the engine; requests still open end with "abort"."""
        await asyncio.to_thread(self._finalizer)

    def cancel(self, request_id: str) -> None:
        """End a request: its consumer gets what there is, with finish_reason "abort". An unknown id is ignored."""
        self._session.cancel(request_id)

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

        Raises RequestError, at the first step of the iteration, and EngineError if the engine fails.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        if request_id is None:  # one that no caller's own can meet
            request_id = uuid.uuid4().hex
        stream = self._session.prepare(
            prompt, sampling_params or self.default_params(), self._listener(loop), request_id, priority
        )
        self._news[stream] = news
        try:
            self._session.submit([stream])
            finished = False
            while not finished:
                await news.wait()
                news.clear()
                output = stream.output(deltas)
                if stream.error:
                    raise stream.error
                yield output
                finished = output.finished
        finally:
            del self._news[stream]
            if not stream.finished:
                self._session.cancel(stream)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """The answer to a conversation; `options` as in `generate`."""
        values = chat_template_kwargs or {}
        prompt = chat_prompt(self.text, messages, chat_template, add_generation_prompt, values)
        async for output in self.generate(prompt, sampling_params, request_id, **options):
            yield output

    def _listener(self, loop: asyncio.AbstractEventLoop) -> Any:
        return _Listener(self._news, loop)


class _Listener:
    """Carries word of changed streams from the engine's thread into an event loop. Equal if it is the same loop."""

    def __init__(self, news: dict[Stream, asyncio.Event], loop: asyncio.AbstractEventLoop):
        self._news, self._loop = news, loop

    def __hash__(self) -> int:
        return id(self._loop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Listener) and other._loop is self._loop

    def __call__(self, changed: list[Stream]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._wake, changed)
        except RuntimeError:  # the event loop is closed: nobody is there to be woken
            pass

    def _wake(self, changed: list[Stream]) -> None:
        for stream in changed:
            if event := self._news.get(stream):
                event.set()
