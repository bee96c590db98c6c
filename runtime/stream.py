"""One user's request on its way out: its `n` answers as tokens and text, growing delta by delta.

The loop's thread adds (`take`), any other reads (`output`), under one lock per stream; a snapshot is made only when
somebody wants one, so a token costs the same whether the answer is long or short.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from .grammar import Matcher
from .request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    fan_out,
)
from .step import Delta
from .text import Text

Logprobs = dict[int, Logprob]
Listener = Callable[[list["Stream"]], None]


class Transcript:
    """One of a request's `n` answers so far, and how much of it has been handed out as deltas."""

    def __init__(self, index: int, scored: bool):
        self.index = index
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[Logprobs] | None = [] if scored else None
        self.cumulative = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._said = 0, 0  # tokens and characters handed out as deltas

    def output(self, deltas: bool) -> CompletionOutput:
        """The answer so far, or what came since the last call with `deltas`."""
        tokens, characters = self._said if deltas else (0, 0)
        if deltas:
            self._said = len(self.token_ids), len(self.text)
        return CompletionOutput(
            index=self.index,
            text=self.text[characters:],
            token_ids=self.token_ids[tokens:],
            cumulative_logprob=None if self.logprobs is None else self.cumulative,
            logprobs=None if self.logprobs is None else self.logprobs[tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class Answer(Transcript):
    """The transcript of one request of the scheduler's. Written by the loop's thread, under the stream's lock."""

    def __init__(self, request: Request, index: int, text: Text | None):
        super().__init__(index, request.params.logprobs is not None)
        self.request = request
        self.last_tokens_at: float | None = None  # on time.monotonic(), for the metrics
        self._spelling = text
        self._decoder = text.decoder(request.params, request.tokens) if text else None

    def take(self, delta: Delta) -> str | None:
        """Add what a commit brought. Returns the stop string if one appeared: the request is over then."""
        last = len(delta.token_ids) - 1
        by_token = (
            delta.finish_reason == "stop"
            and not self.request.params.include_stop_str_in_output
            and last >= 0
            and delta.token_ids[last] in self.request.stop_ids  # not where structured outputs are complete
        )
        for i, token in enumerate(delta.token_ids):
            self.token_ids.append(token)
            if self.logprobs is not None and delta.logprobs:
                self.logprobs.append(spelt(delta.logprobs[i], self._spelling))
                self.cumulative += delta.logprobs[i][token].logprob
            if self._decoder and not (by_token and i == last):  # the token that ends an answer is no part of its text
                self.text += self._decoder.push(token)
                if self._decoder.stopped is not None:
                    self.finish_reason, self.stop_reason = "stop", self._decoder.stopped
                    return self._decoder.stopped
        if delta.finish_reason:
            self.end(delta.finish_reason, delta.stop_reason)
        return None

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Nothing more will come; what the decoder held back is text after all."""
        if self._decoder:
            self.text += self._decoder.finish()
        self.finish_reason, self.stop_reason = reason, stop_reason


class Progress:
    """A request's answers so far, as they are handed out; whoever they belong to fills them in."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    answers: Sequence[Transcript]
    scores: list[Logprobs | None] | None  # the prompt's log-probabilities
    num_cached: int  # of the prompt's tokens, those found in the prefix cache
    metrics: RequestMetrics

    @property
    def finished(self) -> bool:
        """Nothing more will come."""
        return all(answer.finish_reason for answer in self.answers)

    def output(self, deltas: bool = False) -> RequestOutput:
        """A snapshot; with `deltas`, texts, tokens and logprobs only since the last such call."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[answer.output(deltas) for answer in self.answers],
            finished=self.finished,
            prompt_logprobs=self.scores,
            num_cached_tokens=self.num_cached,
            metrics=self.metrics,
        )


class Stream(Progress):
    """A request as its user sees it. `listener` hears of it after each step that changed it."""

    answers: list[Answer]

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int,
        text: Text | None,
        listener: Listener,
        matcher: Callable[[], Matcher | None] = lambda: None,
    ):
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, list(prompt_token_ids)
        self.listener = listener
        self.error: Exception | None = None
        self.answers = [
            Answer(request, i, text)
            for i, request in enumerate(fan_out(request_id, prompt_token_ids, params, priority, matcher=matcher))
        ]
        for answer in self.answers[1:]:  # the prompt is scored once
            answer.request.params = replace(answer.request.params, prompt_logprobs=None)
        self.scores = None if params.prompt_logprobs is None else [None]
        self.metrics = self.answers[0].request.metrics
        self._text, self._lock = text, threading.Lock()

    @property
    def finished(self) -> bool:
        """Nothing more will come."""
        return self.error is not None or super().finished

    def take(self, answer: Answer, delta: Delta) -> str | None:
        """Add a delta to one of the answers; returns the stop string if one appeared."""
        with self._lock:
            if delta.prompt_logprobs and answer.index == 0 and self.scores is not None:
                self.scores += [spelt(entry, self._text) for entry in delta.prompt_logprobs]
            return answer.take(delta)

    def fail(self, error: Exception) -> None:
        """No answer will be completed."""
        with self._lock:
            self.error = error
            for answer in self.answers:
                if not answer.finish_reason:
                    answer.end("error")

    def output(self, deltas: bool = False) -> RequestOutput:
        """As `Progress.output`, from any thread."""
        with self._lock:
            self.num_cached = self.answers[0].request.num_cached or 0
            return super().output(deltas)


def spelt(entry: Logprobs, text: Text | None) -> Logprobs:
    """The same with the tokens' text, where there is a tokenizer."""
    if text is None:
        return entry
    return {token: found._replace(decoded_token=text.token_text(token)) for token, found in entry.items()}
