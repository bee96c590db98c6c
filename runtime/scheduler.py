"""What each step computes. One rule: every request's `computed` catches up with its `length`, be it prompt or output.

Requests are served by priority, then arrival. Admission gives a row and pages for all tokens known; one page more is
taken when they are outgrown. If none is left, the last request in order is thrown out, to recompute later.
`schedule()` may run before earlier steps are committed: row and pages come back only when no step in flight uses them.
Steps run in order, all KV writes of a step before its reads: so a page can be shared from when it is scheduled.
While drafts are verified nothing is scheduled, as how far a request gets is not known; KV past that is overwritten.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush
from typing import Any

from ..engines.errors import EngineError, RequestError, shown
from .kv import PagePool
from .page_tables import PageTables
from .prompt import Limits, check_length
from .request import FinishReason, Request, State
from .speculation.control import Speculation
from .speculation.statistics import SpeculationStats
from .speculation.tree import depth_of, first, no_deeper
from .step import Delta, SchedulerStats, Step, Work

__all__ = ["Delta", "Scheduler", "SchedulerStats", "Step", "Work"]


class Scheduler:
    """Owns the requests, the rows `0 .. max_num_seqs` and the page pool. Not thread-safe: one loop calls it.

    max_num_batched_tokens: tokens per step. max_model_len: prompt and output of one request. eos_token_ids: end a
    request unless it says `ignore_eos`. A request ends with "length" at max_tokens, at max_model_len or, where the
    whole pool (`pool.capacity` tokens) is smaller than both, when it has filled the pool (stop_reason "kv_pool").
    speculation: says when and what to draft; None: never.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int] = (),
        clock: Callable[[], float] = time.monotonic,
        speculation: Speculation | None = None,
    ):
        for name, value, least in (
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("max_model_len", max_model_len, 2),
        ):
            if value < least:
                raise EngineError(f"{name} is {value}; one request needs at least {least}.")
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self._limits = Limits(0, max_model_len, pool.capacity)
        self._tables = PageTables(pool, max_model_len)
        self._clock = clock
        self._speculation = speculation
        self._together = False  # the step that is being made speculates: all requests move in it
        self._verifying = 0  # steps in flight with drafts
        self._last_commit = 0.0
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._waiting: list[Request] = []  # in order
        self._running: list[Request] = []  # in order
        self._draining: set[Request] = set()  # thrown out or ended, with a step in flight that uses their row and pages
        self._rows = list(range(max_num_seqs))  # heap, lowest first: batches stay compact
        self._num_arrivals = self._num_preemptions = self._prefix_queried = self._prefix_hit = 0

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues it. Raises RequestError if its id is in use, or its prompt is empty or never fits context or pool."""
        num_prompt, params, pool = request.num_prompt, request.params, self.pool
        if request.id in self._requests:
            raise RequestError(f"Request id {request.id!r} is in use; give each open request its own.")
        if not isinstance(request.priority, int):
            raise RequestError(
                f"priority is {shown(request.priority)}; it must be an integer, the lowest is served first."
            )
        check_length(num_prompt, self._limits)
        asked = self.max_model_len
        if params.max_tokens is not None:
            asked = min(asked, num_prompt + params.max_tokens)
        request.limit = min(asked, pool.capacity + 1)  # the last token's KV is never needed
        request.limit_reason = "kv_pool" if request.limit < asked else None
        request.stop_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            request.stop_ids |= self.eos_token_ids
        request.order = (request.priority, self._num_arrivals)
        self._num_arrivals += 1
        self._requests[request.id] = request
        insort(self._waiting, request, key=_order)

    def cancel(self, request_id: str) -> Delta | None:
        """Ends it with "abort"; see `finish`."""
        return self.finish(request_id, "abort")

    def finish(
        self, request_id: str, reason: FinishReason = "stop", stop_reason: int | str | None = None
    ) -> Delta | None:
        """Ends a request from outside (a stop string, a client gone) at once: no later commit mentions it.

        Returns its last Delta, or None if it is unknown or has ended. Its row and pages are free when the steps in
        flight are committed, at once if there are none.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request, reason, stop_reason)
        return Delta(request_id, [], None, reason, stop_reason)

    def abandon(self) -> list[Delta]:
        """After a failed step: ends all requests with "error", forgets the cache and all steps in flight."""
        ended = [*self._requests.values()]
        for request in (*ended, *self._draining):
            request.num_in_flight = request.steps_in_flight = self._verifying = 0
        for request in ended:
            self._finish(request, "error", None)
        for request in [*self._draining]:
            self._give_back(request)
        self.pool.clear_cache()
        return [Delta(request.id, [], None, "error") for request in ended]

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """A request is open, or a step in flight still holds pages."""
        return bool(self._requests or self._draining)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_pages=self.pool.num_pages - 1,
            num_held_pages=self.pool.num_held,
            num_cached_pages=self.pool.num_cached,
            prefix_queried_tokens=self._prefix_queried,
            prefix_hit_tokens=self._prefix_hit,
            num_preemptions=self._num_preemptions,
            num_evictions=self.pool.num_evictions,
            speculation=self._speculation.stats() if self._speculation else SpeculationStats(),
        )

    # -- steps ---------------------------------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, or None where nothing can run: no work, or only a commit brings news."""
        works: list[Work] = []
        budget = self.max_num_batched_tokens
        running = self._running  # victims leave from its end, while we walk from its start
        if self._speculation:
            coming = min(self.num_waiting, self.max_num_seqs - len(running))
            self._together = not self._verifying and self._speculation.plan(running, coming)
            if self._verifying or (self._together and any(request.num_in_flight for request in running)):
                return None
        # what may follow under a grammar depends on the token in flight: all such requests move in the same steps
        held = any(request.matcher and request.num_in_flight for request in running)
        i = 0
        while i < len(running) and budget:
            request = running[i]
            i += 1
            if held and request.matcher:
                continue
            start = request.computed
            num = min(len(request.tokens) + request.num_in_flight, request.limit - 1) - start
            if not num:
                continue  # its last token is in flight
            if num > 1:  # a long prompt does not stall those behind it: each keeps one token of the budget
                num = min(num, max(1, budget - (len(running) - i)))
            lacking = self._tables.lacking(request, start + num)
            if lacking > 0 and not self._grow(request, lacking):
                continue
            drafts: Sequence[int] = ()
            if self._together and start + 1 == len(request.tokens):
                drafts = self._guess(request, budget - 1 - (len(running) - i))
            works.append(self._work(request, num + len(drafts), drafts=drafts))
            budget -= num + len(drafts)
        if self._waiting:
            self._admit(works, budget)
        self._verifying += any(work.drafts for work in works)
        return tuple(works) or None

    def commit(
        self,
        step: Step,
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[Any] | None] | None = None,
        prompt_logprobs: Sequence[Sequence[Any] | None] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Delta]:
        """Takes the results of the oldest step in flight, one entry per work, and returns what is new.

        tokens[i]: the `num_samples` tokens of work i, or of one with drafts those that hold (`verify.py`).
        logprobs[i]: an entry per token; prompt_logprobs[i]: an entry per row of logits before those; both are passed on
        unread. drafts[i]: what the executor guesses to follow. Results of requests that ended meanwhile are dropped.
        """
        deltas: list[Delta] = []
        now = self._clock()
        self._verifying -= any(work.drafts for work in step)
        for i, (work, sampled) in enumerate(zip(step, tokens, strict=True)):
            request = work.request
            if not (len(sampled) == work.num_samples or (work.drafts and 0 < len(sampled) < work.num_samples)):
                raise ValueError(
                    f"{len(sampled)} tokens for {request.id}, of which {work.num_samples} were to be sampled"
                )
            request.steps_in_flight -= 1
            request.num_in_flight -= work.num_samples
            if request.state is not State.FINISHED:
                if sampled:
                    request.drafts = drafts[i] if drafts else ()
                if work.drafts:
                    request.computed = work.start + len(sampled)  # what was written for the drafts that failed is void
                scores = prompt_logprobs[i] if prompt_logprobs else None
                if sampled:
                    deltas.append(self._accept(request, sampled, logprobs[i] if logprobs else None, scores, now))
                elif scores:
                    deltas.append(Delta(request.id, [], prompt_logprobs=scores))
            if not request.steps_in_flight and request in self._draining:
                self._give_back(request)
        if self._speculation:
            self._speculation.observe(step, tokens, now - self._last_commit)
            self._last_commit = now
        return deltas

    # -- inside --------------------------------------------------------------------------------------------------------

    def _guess(self, request: Request, spare: int) -> Sequence[int]:
        """At most `spare` drafts for a request that is about to decode, as far as limit, pages and grammar let."""
        assert self._speculation is not None
        end = request.computed + 1
        most = max(0, min(spare, self.max_model_len - end))
        drafts = no_deeper(self._speculation.propose(request, most), request.limit - 1 - end)
        if drafts and request.matcher:
            drafts = request.matcher.fitting(drafts)
        return first(drafts, self._tables.reserve(request, end, len(drafts)))

    def _work(self, request: Request, num: int, fresh: bool = False, drafts: Sequence[int] = ()) -> Work:
        start = request.computed
        end = start + num
        num_samples = num_logits = int(end - len(drafts) == len(request.tokens) + request.num_in_flight)
        num_ahead = 0
        if drafts:
            num_samples = num_logits = 1 + len(drafts)
        if self._together and num_samples and self._speculation:
            most = request.limit - 1 - (end - len(drafts) + depth_of(drafts))
            num_ahead = self._tables.reserve(request, end, self._speculation.num_ahead(request, most))
        if request.num_scored < request.num_prompt - 1 and request.params.prompt_logprobs is not None:
            num_logits = max(num_samples, end - max(start, request.num_scored))
            request.num_scored = max(request.num_scored, min(end, request.num_prompt - 1))
        request.computed = end
        request.num_in_flight += num_samples
        request.steps_in_flight += 1
        self._tables.share(request)
        return Work(request, request.row, start, num, num_logits, request.pages, num_samples, fresh, drafts, num_ahead)

    def _grow(self, request: Request, lacking: int) -> bool:
        """More pages for a running request, at the cost of the last in order. False: a commit will bring them."""
        while self.pool.num_free < lacking:
            if self._draining:
                return False  # pages are on their way back: throw out nobody else
            victim = self._running.pop()
            victim.state = State.PREEMPTED
            victim.num_preemptions += 1
            self._num_preemptions += 1
            self._let_go(victim)
            if victim is request:
                return False
        self._tables.grow(request, lacking)
        return True

    def _admit(self, works: list[Work], budget: int) -> None:
        """Takes requests from the queue while rows, pages and budget last. Nobody overtakes its head."""
        while self._waiting and self._rows and budget:
            request = self._waiting[0]
            num_known = len(request.tokens)
            # A page in hand for each running request: admitting one only to throw it out at once helps nobody.
            if not self._tables.begin(request, spare=len(self._running)):
                return
            request.row = heappop(self._rows)
            request.state = State.RUNNING
            del self._waiting[0]
            insort(self._running, request, key=_order)
            if request.num_cached is None:
                request.num_cached = request.computed
                request.metrics.first_scheduled = self._clock()
                self._prefix_queried += num_known
                self._prefix_hit += request.computed
            num = min(num_known - request.computed, budget)
            works.append(self._work(request, num, fresh=True))
            budget -= num

    def _accept(self, request: Request, sampled: Sequence[int], logprobs: Any, scores: Any, now: float) -> Delta:
        """Appends the sampled tokens, up to one that ends the request."""
        tokens = request.tokens
        before = len(tokens)
        unstoppable = request.num_prompt + request.params.min_tokens  # up to this length the sampler masks stop_ids
        reason: FinishReason | None = None
        stop: int | str | None = None
        for token in sampled:
            try:
                complete = request.matcher is not None and request.matcher.advance(token)
            except RequestError as found:
                reason, stop = "error", str(found)
                break
            tokens.append(token)
            if token in request.stop_ids and len(tokens) > unstoppable:
                reason, stop = "stop", None if token in self.eos_token_ids else token
                break
            if complete:
                reason = "stop"
                break
            if len(tokens) == request.limit:
                reason, stop = "length", request.limit_reason
                break
        if before == request.num_prompt:
            request.metrics.first_token = now
        self._tables.share(request)
        if reason:
            self._finish(request, reason, stop)
        new = tokens[before:]
        return Delta(request.id, new, logprobs[: len(new)] if logprobs else None, reason, stop, scores or None)

    def _finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None) -> None:
        match request.state:
            case State.WAITING:
                self._waiting.remove(request)
            case State.RUNNING:
                self._running.remove(request)
        del self._requests[request.id]
        request.state = State.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.metrics.finished = self._clock()
        if self._speculation:
            self._speculation.end(request)
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        if request.steps_in_flight:
            self._draining.add(request)
        else:
            self._give_back(request)

    def _give_back(self, request: Request) -> None:
        """Returns row and pages; a preempted request takes its old place in the queue."""
        self._draining.discard(request)
        if request.row >= 0:
            heappush(self._rows, request.row)
            request.row = -1
        self._tables.release(request)
        if request.state is State.PREEMPTED:
            request.state = State.WAITING
            insort(self._waiting, request, key=_order)


def _order(request: Request) -> tuple[int, int]:
    return request.order
