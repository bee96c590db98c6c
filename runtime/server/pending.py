"""A request whose answer is under way in the engine process, as the API process sees it.

It knows what was asked, so that it can be asked again of another engine process, and whether anything was handed out,
after which it cannot. It grows with every Update; a consumer that is slow sees fewer, longer outputs.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import replace

from ..request import RequestMetrics, RequestOutput, SamplingParams
from ..stream import Progress, Transcript
from .channel import Submit, Update, options


class Pending(Progress):
    """A request under way: what was asked, what has come of it, and word for its consumer when that changes."""

    def __init__(self, number: int, request_id: str, params: SamplingParams, priority: int):
        self.number, self.request_id, self.priority = number, request_id, priority
        self.prompt = None
        self.prompt_token_ids = []
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
        self.answers = [Transcript(index, scored) for index in range(self.params.n)]
        self.scores = None if self.params.prompt_logprobs is None else []
        self.num_cached = 0
        self.metrics = RequestMetrics(self._arrival)

    def submit(self) -> Submit:
        """The message that asks for it."""
        return Submit(self.number, self.prompt_token_ids, options(self.params), self.priority, self._arrival)

    def take(self, update: Update) -> None:
        """Add what came."""
        if self.finished:
            return
        for part in update.parts:
            answer = self.answers[part.index]
            answer.text += part.text
            answer.token_ids += part.token_ids
            if answer.logprobs is not None and part.logprobs is not None:
                answer.logprobs += part.logprobs
                answer.cumulative = part.cumulative
            answer.finish_reason, answer.stop_reason = part.finish_reason, part.stop_reason
        if self.scores is not None and update.prompt_logprobs is not None:
            self.scores += update.prompt_logprobs
        self.num_cached = update.num_cached_tokens
        times = self.metrics
        times.first_scheduled, times.first_token, times.finished = update.times
        self.news.set()

    def output(self, deltas: bool = False) -> RequestOutput:
        """A snapshot to hand out, as `Progress.output`."""
        self.handed_out = True
        return super().output(deltas)

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self.error = error
        self.news.set()

    def abort(self) -> None:
        """It ends with what there is."""
        for answer in self.answers:
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
