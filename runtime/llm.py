"""`LLM`: prompts in, finished answers out, in order; the names and shapes that vLLM's users know.

The engine runs in a thread of its own, in-flight batched: all prompts of a call, and of calls from other threads, share
its steps. Everything is checked before anything is scheduled, so a bad prompt costs no work.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from ..engines.errors import RequestError, shown
from .prompt import Prompt, split
from .request import RequestOutput, SamplingParams
from .session import Opened
from .stream import Stream
from .text import Message, Text


class LLM(Opened):
    """An engine directory, open for generation. `options` are those of `ServeConfig`: max_num_seqs,
    max_num_batched_tokens, max_model_len, page_size, num_kv_pages or kv_cache_memory, prefix_cache, speculate
    ("ngram", "suffix", or "draft", "eagle" or "medusa" with draft_engine), num_draft_tokens.

    Raises EngineError: no engine there, a damaged one, one for another target, or not enough memory for its KV pool.
    """

    def __init__(self, engine: str | os.PathLike, **options: Any):
        super().__init__(engine, **options)
        self.close = weakref.finalize(self, self._session.close)  # also when forgotten, and at exit

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: text, token ids, {"prompt": ..} or {"prompt_token_ids": ..}, or a list of such.

        sampling_params: one for all, or one each; None takes `default_params()`. priority: lower is served first.
        progress: show a bar (`use_tqdm` is the same, for vLLM's users).
        Raises RequestError for a prompt or a parameter that cannot be honoured, EngineError if the engine fails.
        """
        several = split(prompts)
        given = self.default_params() if sampling_params is None else sampling_params
        params = _one_each("sampling_params", given, SamplingParams, len(several))
        priorities = _one_each("priority", priority, int, len(several))
        done: SimpleQueue[Stream] = SimpleQueue()

        def listen(changed: list[Stream]) -> None:
            for stream in changed:
                if stream.finished:
                    done.put(stream)

        streams = [
            self._session.prepare(prompt, how, listen, priority=rank)
            for prompt, how, rank in zip(several, params, priorities, strict=True)
        ]
        self._run(streams, done, progress if use_tqdm is None else use_tqdm)
        return [stream.output() for stream in streams]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: messages are {"role": .., "content": ..}. `options` as in `generate`."""
        if not isinstance(messages, Sequence | Mapping):
            raise RequestError(
                f"The messages are {shown(messages)}; they must be a list of messages, or of such lists."
            )
        one = isinstance(messages, Mapping) or not messages or isinstance(messages[0], Mapping)
        conversations = [messages] if one else messages
        values = dict(chat_template_kwargs or {})
        if tools is not None:
            values["tools"] = tools
        prompts = [
            chat_prompt(self.text, conversation, chat_template, add_generation_prompt, values)  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, **options)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, deltas: bool = False, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """One prompt's answer as it grows; with `deltas`, each output holds only what is new. Leaving early cancels."""
        news: SimpleQueue[None] = SimpleQueue()
        stream = self._session.prepare(
            prompt, sampling_params or self.default_params(), lambda _: news.put(None), priority=priority
        )
        return self._follow(stream, news, deltas)

    def _follow(self, stream: Stream, news: SimpleQueue[None], deltas: bool) -> Iterator[RequestOutput]:
        self._session.submit([stream])
        try:
            finished = False
            while not finished:
                news.get()
                while not news.empty():  # we are slow: one output for all that has come
                    news.get()
                output = stream.output(deltas)
                if stream.error:
                    raise stream.error
                yield output
                finished = output.finished
        finally:
            if not stream.finished:
                self._session.cancel(stream)

    def _run(self, streams: list[Stream], done: SimpleQueue[Stream], progress: bool) -> None:
        """Submit and wait for all. Whatever interrupts the wait cancels what is still open."""
        self._session.submit(streams)
        try:
            with _bar(len(streams), progress) as advance:
                for _ in streams:
                    stream = done.get()
                    if stream.error:
                        raise stream.error
                    advance(stream)
        finally:
            for stream in streams:
                if not stream.finished:
                    self._session.cancel(stream)


def chat_prompt(
    text: Text | None, messages: Sequence[Message], template: str | None, add_generation_prompt: bool, values: Mapping
) -> Prompt:
    """The prompt of a conversation: the template writes its own special tokens, so none are added."""
    if text is None:
        raise RequestError("This engine has no tokenizer, so it has no chat; send token ids.")
    if not messages:
        raise RequestError("The conversation is empty; it needs at least one message.")
    if taken := sorted(text.own_values & values.keys()):
        raise RequestError(f"chat_template_kwargs sets {taken[0]}, which is not for it to set.")
    rendered = text.render(messages, template=template, add_generation_prompt=add_generation_prompt, **values)
    return {"prompt": rendered, "prompt_token_ids": text.encode(rendered, add_special_tokens=False)}


def _one_each(name: str, given: Any, kind: type, num: int) -> list[Any]:
    if isinstance(given, kind):
        return [given] * num
    if not isinstance(given, Sequence) or len(given) != num:
        found = f"{len(given)} of them" if isinstance(given, Sequence) else shown(given)
        raise RequestError(f"{name} is {found} for {num} prompts; give one for all, or one for each.")
    return list(given)


class _bar:
    """A progress bar on stderr, or nothing."""

    def __init__(self, total: int, shown: bool):
        self._total, self._shown, self._tokens = total, shown, 0
        self._progress: Any = None

    def __enter__(self) -> Any:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("generate"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("{task.fields[rate]:.0f} tokens/s"))  # fmt: skip
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=self._total, rate=0.0)
            self._progress.start()
        return self._advance

    def __exit__(self, *_: Any) -> None:
        if self._progress:
            self._progress.stop()

    def _advance(self, stream: Stream) -> None:
        if self._progress:
            self._tokens += sum(len(answer.token_ids) for answer in stream.answers)
            task = self._progress.tasks[0]
            self._progress.update(self._task, advance=1, rate=self._tokens / max(task.elapsed or 0, 1e-9))
