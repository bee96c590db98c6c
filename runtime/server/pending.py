"""A request whose answer is under way in the engine process, as the API process sees it.

It knows what was asked, so that it can be asked again of another engine process, and whether anything was handed out,
after which it cannot. It grows with every Update; a consumer that is slow sees fewer, longer outputs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import replace

from ..request import Logprob, RequestMetrics, RequestOutput, SamplingParams
from ..stream import Transcript
from .channel import Submit, Update, options


class Pending:
    """A request under way: what was asked, what has come of it, and word for its consumer when that changes."""

    def __init__(self, number: int, request_id: str, params: SamplingParams, priority: int):
        self.number, self.request_id, self.priority = number, request_id, priority
        self.prompt: str | None = None
        self.token_ids: list[int] = []
        if params.seed is None and not params.greedy:
            params = replace(params, seed=secrets.randbits(63))  # asked again, the answer is the same
        self.params = params
        self.news = asyncio.Event()
        self.error: Exception | None = None
        self.lost: str | None = None  # what became of the engine process that had it
        self.sent_to: object = None
        self.handed_out = self.asked_again = self.cancelled = False
        self._arrival = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        scored = self.params.logprobs is not None
        self._answers = [Transcript(index, scored) for index in range(self.params.n)]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if self.params.prompt_logprobs is None else []
        )
        self._num_cached = 0
        self._metrics = RequestMetrics(self._arrival)

    @property
    def finished(self) -> bool:
        return all(answer.finish_reason for answer in self._answers)

    def submit(self) -> Submit:
        """The message that asks for it."""
        return Submit(self.number, self.token_ids, options(self.params), self.priority, self._arrival)

    def take(self, update: Update) -> None:
        """Add what came."""
        if self.finished:
            return
        for part in update.parts:
            answer = self._answers[part.index]
            answer.text += part.text
            answer.token_ids += part.token_ids
            if answer.logprobs is not None and part.logprobs is not None:
                answer.logprobs += part.logprobs
                answer.cumulative = part.cumulative
            answer.finish_reason, answer.stop_reason = part.finish_reason, part.stop_reason
        if self._prompt_logprobs is not None and update.prompt_logprobs is not None:
            self._prompt_logprobs += update.prompt_logprobs
        self._num_cached = update.num_cached_tokens
        times = self._metrics
        times.first_scheduled, times.first_token, times.finished = update.times
        self.news.set()

    def output(self, deltas: bool) -> RequestOutput:
        """A snapshot to hand out."""
        self.handed_out = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[answer.output(deltas) for answer in self._answers],
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached,
            metrics=self._metrics,
        )

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self.error = error
        self.news.set()

    def abort(self) -> None:
        """It ends with what there is."""
        for answer in self._answers:
            answer.finish_reason = answer.finish_reason or "abort"
        self.news.set()

    def lose(self, why: str) -> None:
        """The engine process is gone. Of no concern if it was not asked yet, or all has come."""
        if self.sent_to is None or self.finished or self.error is not None:
            return
        self.sent_to = None
        if self.cancelled:
            self.abort()
        else:
            self.lost = why
            self.news.set()

    def begin_again(self) -> None:
        """Forget what came: nobody has seen it."""
        self.lost, self.asked_again = None, True
        self.news.clear()
        self._clear()
