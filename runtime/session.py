"""An open engine with its loop running in a thread: what `LLM` and `AsyncLLM` share.

Requests are checked in the caller's thread and handed over as orders; the loop's thread owns scheduler and streams.
If a step fails, every open stream fails with the reason and the session is unhealthy from then on: nobody ever waits
for an answer that cannot come.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from ..engines.errors import EngineError, RequestError, shown
from . import loop
from .batch import Arena
from .capacity import ServeConfig, model_len
from .engine import Engine
from .executor import Executor, open_executor
from .grammar import Grammars, Matcher, StructuredOutputs
from .kv import PagePool
from .metrics import Metrics, Recorder
from .prompt import Limits, Prompt, tokens_of
from .request import SamplingParams
from .scheduler import Scheduler
from .speculation.control import Speculation
from .speculation.drafter import open_drafter
from .step import Delta
from .stream import Answer, Listener, Stream
from .text import Text


class Session:
    """Opens the engine in `folder` and serves it until `close`. Raises EngineError if it cannot be opened."""

    def __init__(self, folder: Any, config: ServeConfig):
        self.engine = Engine.open(folder, dummy=config.load_format == "dummy")
        if self.engine.manifest.head is not None:
            raise EngineError(
                f"{folder} is the engine of a head, which says nothing by itself; open the one that it drafts for, with"
                " speculate=eagle and this one as draft_engine."
            )
        max_len = model_len(self.engine.manifest, config)
        self.executor = executor = open_executor(self.engine, config)
        try:
            arena = self._set_up(executor, max_len)
        except BaseException:
            executor.close()
            raise
        self.failure: BaseException | None = None
        self._recorder = Recorder()
        self._open: dict[str, tuple[Stream, Answer]] = {}  # by the id of the scheduler's request
        self._numbers = itertools.count()
        self._closed = False
        self._grammars: Grammars | None = None  # made when a request first asks for structured outputs
        self._gate = threading.Lock()  # no order gets into the inbox behind the one to stop, where nobody would read it
        self._inbox: loop.Inbox = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(arena, executor), name="ingot-loop", daemon=True)
        self._thread.start()

    def _set_up(self, executor: Executor, max_len: int) -> Arena:
        config, model = executor.config, self.engine.manifest.model
        assert config.max_num_seqs and config.max_num_batched_tokens and config.page_size
        self.text = self.engine.text  # read meanwhile
        pool = PagePool(executor.num_pages, config.page_size, config.prefix_cache)
        self.limits = Limits(model.vocab_size, max_len, pool.capacity)
        speculation = None
        if config.speculate and executor.costs:
            most, nodes = config.num_draft_tokens, config.num_draft_nodes
            speculation = Speculation(open_drafter(config), most, executor.costs, config.adapt_drafts, nodes)
        self.scheduler = Scheduler(
            pool, config.max_num_seqs, config.max_num_batched_tokens, max_len, model.eos_token_ids,
            speculation=speculation,
        )  # fmt: skip
        return Arena(config.max_num_seqs, config.max_num_batched_tokens, max_len, config.page_size, executor.allocate)

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        listener: Listener,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Stream:
        """A checked stream, not yet submitted. Raises RequestError."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"The sampling parameters are {shown(params)}; they must be a SamplingParams.")
        text, ids = tokens_of(prompt, self.text, self.limits)
        params.check_vocabulary(self.limits.vocab_size)
        ending = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            ending |= self.scheduler.eos_token_ids
        if params.min_tokens and len(ending) >= self.limits.vocab_size:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, but each of the model's tokens ends the answer; leave some out of"
                " stop_token_ids."
            )
        self.executor.check(params, len(ending))
        if params.stop_strings and self.text is None:
            raise RequestError("This engine has no tokenizer, so stop strings cannot be found; use stop_token_ids.")
        number = str(next(self._numbers)) if request_id is None else request_id
        return Stream(number, text, ids, params, priority, self.text, listener, self._matcher(params))

    def _matcher(self, params: SamplingParams) -> Callable[[], Matcher | None]:
        """Makes a matcher for each answer. Raises RequestError: no tokenizer, no library, a grammar it refuses."""
        wanted = params.structured_outputs
        if not isinstance(wanted, StructuredOutputs):
            return lambda: None
        if self.text is None:
            raise RequestError("This engine has no tokenizer, so structured outputs cannot be followed.")
        if self._grammars is None:
            self._grammars = Grammars(
                self.text.tokenizer.to_str(), self.limits.vocab_size, self.scheduler.eos_token_ids
            )
        return partial(self._grammars.matcher, wanted)

    def submit(self, streams: Sequence[Stream]) -> None:
        """Hand over to the loop. A stream that the scheduler refuses fails with a RequestError of its own.

        Raises EngineError as `check` does.
        """
        with self._gate:
            self.check()
            self._inbox.put(lambda: self._add(streams))

    def cancel(self, which: str | Stream) -> None:
        """End a request with "abort", by its id or as the stream that it is; its pages and row are free within one
        step. An unknown one is ignored."""
        with self._gate:
            if not self._closed:
                self._inbox.put(lambda: self._cancel(which))

    @property
    def healthy(self) -> bool:
        """Open, and no step has failed."""
        return self.failure is None and not self._closed and self._thread.is_alive()

    def check(self) -> None:
        """Raises EngineError with the reason unless the engine is healthy."""
        if self.failure is not None:
            raise self._error()
        if self._closed:
            raise EngineError("The engine is closed; open it again.")
        if not self._thread.is_alive():  # threads do not survive a fork
            raise EngineError(
                "The engine was opened before this process was forked, and its loop did not come along; open it in the"
                ' process that uses it (multiprocessing: the "spawn" method).'
            )

    @property
    def progress(self) -> tuple[int, bool]:
        """Steps committed, and whether there is work: an engine hangs if it has work for long and commits nothing."""
        return self._recorder.steps, self.scheduler.has_work or not self._inbox.empty()

    def metrics(self) -> Metrics:
        """A snapshot of what the engine is doing."""
        return self._recorder.snapshot(self.scheduler.stats(), self.healthy)

    def close(self) -> None:
        """End the loop; requests still open are aborted. A second call does nothing."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()

    # -- the loop's thread ---------------------------------------------------------------------------------------------

    def _serve(self, arena: Arena, executor: Executor) -> None:
        try:
            loop.run(self.scheduler, arena, executor, self._inbox, self._deliver)
            self._hand_out([delta for key in list(self._open) if (delta := self.scheduler.cancel(key))])
        except BaseException as error:
            self._fail(error)
            while loop.take(self._inbox, idle=True):  # whoever comes now is told
                pass
        finally:
            executor.close()

    def _add(self, streams: Sequence[Stream]) -> None:
        refused = []
        for stream in streams:
            try:
                if self.failure is not None:
                    raise self._error()
                for answer in stream.answers:
                    self.scheduler.add(answer.request)
                    self._open[answer.request.id] = stream, answer
            except (RequestError, EngineError) as error:
                self._drop(stream, error)
                refused.append(stream)
        _tell(refused)

    def _drop(self, stream: Stream, error: Exception) -> None:
        """One request fails, whatever there is of its answers."""
        for answer in stream.answers:
            if self._open.get(answer.request.id, (None,))[0] is stream:
                self.scheduler.cancel(answer.request.id)
                del self._open[answer.request.id]
        stream.fail(error)

    def _cancel(self, which: str | Stream) -> None:
        keys = [key for key, (stream, _) in self._open.items() if which in (stream, stream.request_id)]
        self._hand_out([delta for key in keys if (delta := self.scheduler.cancel(key))])

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """What a commit brought."""
        self._hand_out(deltas)
        num_tokens = sum(len(delta.token_ids) for delta in deltas)
        self._recorder.step(time.monotonic(), num_tokens, self.scheduler.has_work)

    def _hand_out(self, deltas: Sequence[Delta]) -> None:
        """Deltas to their streams; a stop string ends its request in the scheduler, too."""
        now = time.monotonic()
        changed: dict[Any, Any] = {}
        failed: dict[Stream, RequestError] = {}
        for delta in deltas:
            stream, answer = self._open[delta.request_id]
            if delta.token_ids:
                self._recorder.tokens(answer.last_tokens_at, now, answer.request.metrics.arrival)
                answer.last_tokens_at = now
            stop = stream.take(answer, delta)
            if stop is not None:
                self.scheduler.finish(delta.request_id, "stop", stop)
            if answer.finish_reason:
                del self._open[delta.request_id]
                request = answer.request
                self._recorder.end(request.metrics, answer.finish_reason, request.num_prompt, len(answer.token_ids))
            if answer.finish_reason == "error":
                failed[stream] = RequestError(str(answer.stop_reason))
            changed[stream] = None
        for stream, error in failed.items():
            self._drop(stream, error)
        _tell(list(changed))

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        streams = dict.fromkeys(stream for stream, _ in self._open.values())
        self._open.clear()
        self.scheduler.abandon()
        for stream in streams:
            stream.fail(self._error())
        _tell(list(streams))

    def _error(self) -> EngineError:
        mend = getattr(self.failure, "mend", "open it again")
        error = EngineError(f"The engine failed in a step ({type(self.failure).__name__}: {self.failure}); {mend}.")
        error.__cause__ = self.failure
        return error


class Opened:
    """What `LLM` and `AsyncLLM` say of the engine they have open."""

    def __init__(self, engine: str | os.PathLike, **options: Any):
        self._session = Session(engine, ServeConfig(**options))

    @property
    def text(self) -> Text | None:
        """Tokenizer, chat template and decoder; None where the engine has no tokenizer."""
        return self._session.text

    @property
    def healthy(self) -> bool:
        """Open, and no step has failed."""
        return self._session.healthy

    def check(self) -> None:
        """Raises EngineError with the reason unless the engine is healthy."""
        self._session.check()

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._session.limits.vocab_size

    @property
    def max_num_seqs(self) -> int:
        """Sequences that are decoded at a time."""
        found = self._session.executor.config.max_num_seqs
        assert found is not None
        return found

    @property
    def max_model_len(self) -> int:
        """Tokens that a request may have, its answer included."""
        return self._session.limits.max_model_len

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose keys and values the pool holds."""
        return self._session.limits.kv_capacity

    def default_params(self) -> SamplingParams:
        """Sampling as the model's generation_config.json suggests."""
        return self._session.engine.default_params()

    def metrics(self) -> Metrics:
        """A snapshot of what the engine is doing."""
        return self._session.metrics()


def _tell(streams: Sequence[Stream]) -> None:
    """Each listener once, with all of its streams."""
    by_listener: dict[Listener, list[Stream]] = {}
    for stream in streams:
        by_listener.setdefault(stream.listener, []).append(stream)
    for listener, some in by_listener.items():
        listener(some)
