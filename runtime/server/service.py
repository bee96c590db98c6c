"""One connection of the engine process: requests come in, what is new of them goes out, paced.

One thread reads the socket, the session's runs steps, one writes. What is not yet written is kept per request, never
per message: while the API is slow, answers grow in their streams and go out together, in one message.
The first word of a stream and its end are written at once. What lies between waits a little where many are open, since
each event of a stream costs the API, and the client, some 50 us: see `SHARE`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ...engines.errors import EngineError, RequestError
from ..request import SamplingParams
from ..session import Session
from ..stream import Stream
from .channel import (
    MAX_POSITIONS,
    Cancel,
    ChannelError,
    Close,
    Failed,
    Frames,
    Measure,
    Message,
    News,
    Part,
    Ping,
    Pong,
    Ready,
    Refused,
    Snapshot,
    Submit,
    ToEngine,
    Update,
    cut,
    frame,
    num_positions,
    options,
)

METRICS_EVERY = 0.5  # seconds between snapshots; one takes some 3 ms of sorting latencies
BROKEN = 3  # what `serve` returns after Failed
EVENT = 50e-6  # seconds of CPU that an event of a stream costs the API
SHARE = 0.1  # of a core that the events of all streams together may take
_RECEIVE = 1 << 16  # bytes read at a time


class _Due(NamedTuple):
    """What is to be written next."""

    streams: list[Stream]
    refused: dict[int, str]
    pong: bool
    snapshot: bool
    fault: str | None
    closing: bool


class Service:
    """A session served over a socket. `listen` runs in one thread, `serve` in another.

    longest_pause: seconds that a stream's next words may wait, see `SHARE`; 0: they are written at once. name: no other
    connection's. main: the process ends with this connection; else only the requests that came by it.
    """

    def __init__(self, sock: socket.socket, longest_pause: float, name: str = "0", main: bool = True):
        self._socket, self._longest_pause, self._name, self._main = sock, longest_pause, name, main
        self._session: Session | None = None
        self._opened = threading.Event()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="ingot-compile")
        self._turn = threading.Condition()  # guards all below; notified when there is something to write
        self._compiling: set[int] = set()  # requests that are not with the session yet
        self._called_off: set[int] = set()  # those of them that were cancelled
        self._open: set[Stream] = set()  # that were begun for this connection, and of which not all is written
        self._urgent: dict[Stream, None] = {}  # what is new of these is not to wait
        self._changed: dict[Stream, None] = {}  # of these it may
        self._begun: set[Stream] = set()  # of which something was written, but not the end
        self._next_words = 0.0  # when those of `_changed` are due, on time.monotonic()
        self._refused: dict[int, str] = {}
        self._pong = self._closing = self._left = False
        self._asked = self._answered = 0  # numbers of Measures
        self._fault: str | None = None  # why the channel cannot be used any more
        self._stale = False  # something happened since the last snapshot
        self._next_snapshot = 0.0  # on time.monotonic()
        self._num_scored: dict[Stream, int] = {}  # prompt_logprobs written

    # -- the reading thread --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Carry out what the API sends, until its end is closed."""
        try:
            frames: Frames[ToEngine] = Frames(ToEngine)
            while data := self._receive():
                for message in frames.feed(data):
                    self._take(message)
        except ChannelError as error:
            self._give_up(str(error))
        except BaseException as error:
            traceback.print_exc()
            self._give_up(f"{type(error).__name__}: {error}")
        else:
            self._gone()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except ConnectionError:
            return b""

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Close) and self._main and not self._opened.is_set():
            os._exit(0)
        self._opened.wait()
        session = self._session
        assert session is not None
        match message:
            case Submit() if "structured_outputs" in message.params:
                with self._turn:
                    self._compiling.add(message.number)
                self._compiler.submit(self._compile, session, message)
            case Submit():
                self._begin(session, message)
            case Cancel():
                with self._turn:
                    if message.number in self._compiling:
                        self._called_off.add(message.number)
                    session.cancel(self._id(message.number))
            case Ping() | Measure() | Close():
                with self._turn:
                    if isinstance(message, Measure):
                        self._asked = message.number
                    self._pong |= isinstance(message, Ping)
                    self._closing |= isinstance(message, Close)
                    self._turn.notify()

    def _begin(self, session: Session, message: Submit) -> None:
        try:
            params = SamplingParams(**message.params)
            stream = session.prepare(
                message.token_ids, params, self.changed, self._id(message.number), message.priority
            )
            for answer in stream.answers:
                answer.request.metrics.arrival = message.arrival
            with self._turn:
                session.submit([stream])
                self._open.add(stream)
                if self._left or message.number in self._called_off:
                    session.cancel(stream.request_id)
        except RequestError as error:
            with self._turn:
                self._refused[message.number] = str(error)
                self._turn.notify()
        except EngineError:  # broken: the writer finds it out
            with self._turn:
                self._turn.notify()

    def _compile(self, session: Session, message: Submit) -> None:
        """As `_begin`, for a grammar, which may take long: nobody else waits for it."""
        try:
            self._begin(session, message)
        except BaseException as error:
            traceback.print_exc()
            self._give_up(f"{type(error).__name__}: {error}")
        with self._turn:
            self._compiling.discard(message.number)
            self._called_off.discard(message.number)

    def _gone(self) -> None:
        """Nobody is at the other end."""
        if self._main:
            os._exit(0)
        with self._turn:
            self._closing = True
            self._turn.notify()

    def _id(self, number: int) -> str:
        return f"{self._name}:{number}"

    def _give_up(self, fault: str) -> None:
        with self._turn:
            self._fault = fault
            self._turn.notify()

    # -- the session's thread ------------------------------------------------------------------------------------------

    def changed(self, streams: Sequence[Stream]) -> None:
        """The session's listener: nothing is copied here, a stream that is already due stays so."""
        with self._turn:
            for stream in streams:
                if stream.finished or stream not in self._begun:
                    self._changed.pop(stream, None)
                    self._urgent[stream] = None
                else:
                    self._changed[stream] = None
            self._stale = self._main  # others ask when they want to know
            self._turn.notify()

    # -- the writing thread --------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Write a message, waiting until the socket has taken it."""
        try:
            self._socket.sendall(frame(message))
        except ConnectionError:
            self._gone()

    def serve(self, session: Session) -> int:
        """Tell the API that the engine is open, then what happens in it, until closed. Returns the exit code."""
        self.send(_ready(session))
        self._session = session
        self._opened.set()
        while True:
            due = self._next()
            for news in self._news(due.streams, due.refused):
                self.send(news)
            for number, why in due.refused.items():
                self.send(Refused(number, why))
            if session.failure is not None:
                failure = session.failure
                self.send(Failed(f"failed in a step ({type(failure).__name__}: {failure})"))
                return BROKEN
            if due.fault is not None:
                self.send(Failed(f"could not read the channel ({due.fault})"))
                if not self._main:
                    self._leave(session)
                return BROKEN
            if due.pong:
                self.send(Pong(*session.progress))
            if due.snapshot:
                self._snapshot(session)
            if due.closing:
                self._leave(session)
                return 0

    def _leave(self, session: Session) -> None:
        if self._main:
            session.close()
            return
        with self._turn:
            self._left = True  # what is still being read, or compiled, ends as it begins
            streams = list(self._open)
        for stream in streams:
            session.cancel(stream.request_id)
        self._socket.close()

    def _next(self) -> _Due:
        """Waits until something is due."""
        with self._turn:
            while True:
                now = time.monotonic()
                snapshot = self._asked > self._answered or (self._stale and now >= self._next_snapshot)
                words = bool(self._changed) and now >= self._next_words
                if words or self._urgent or self._refused or self._pong or self._closing or self._fault or snapshot:
                    break
                times = [self._next_snapshot] * self._stale + [self._next_words] * bool(self._changed)
                self._turn.wait(min(times) - now if times else None)
                if self._session and self._session.failure:
                    break
            streams = list(self._urgent)
            if words:
                streams += self._changed
                self._changed = {}
                self._next_words = now + min(self._longest_pause, len(self._begun) * EVENT / SHARE)
            due = _Due(streams, self._refused, self._pong, snapshot, self._fault, self._closing)
            self._urgent, self._refused, self._pong = {}, {}, False
            ended = [stream for stream in streams if stream.finished]
            self._begun.update(streams)
            for known in (self._begun, self._open):
                known.difference_update(ended)
            if snapshot:
                self._answered, self._stale = self._asked, False
            return due

    def _snapshot(self, session: Session) -> None:
        working = session.progress[1]
        self.send(Snapshot(session.metrics(), self._answered))
        with self._turn:
            self._stale |= (
                working and self._main
            )  # pages are given back after the last token, so there will be one more
            self._next_snapshot = time.monotonic() + METRICS_EVERY

    def _news(self, streams: list[Stream], refused: dict[int, str]) -> Iterator[News]:
        """All that is new, in messages of at most MAX_POSITIONS tokens. The scheduler's refusals go into `refused`."""
        batch: list[Update] = []
        room = MAX_POSITIONS
        for stream in streams:
            if stream.error is not None:
                if isinstance(stream.error, RequestError):
                    refused[_number(stream)] = str(stream.error)
                continue
            for update in cut(self._update(stream)):
                size = num_positions(update)
                if size > room and batch:
                    yield News(batch)
                    batch, room = [], MAX_POSITIONS
                batch.append(update)
                room -= size
        if batch:
            yield News(batch)

    def _update(self, stream: Stream) -> Update:
        output = stream.output(deltas=True)
        parts = [
            Part(
                a.index, a.text, list(a.token_ids), list(a.logprobs) if a.logprobs is not None else None,
                a.cumulative_logprob or 0.0, a.finish_reason, a.stop_reason,
            )
            for a in output.outputs
            if a.token_ids or a.text or a.finish_reason
        ]  # fmt: skip
        scores, metrics = output.prompt_logprobs, output.metrics
        assert metrics is not None
        if scores is not None:
            begin = self._num_scored.get(stream, 0)
            scores = scores[begin:]
            self._num_scored[stream] = begin + len(scores)
            if output.finished:
                self._num_scored.pop(stream)
        times = metrics.first_scheduled, metrics.first_token, metrics.finished
        return Update(_number(stream), parts, output.num_cached_tokens, times, list(scores) if scores else None)


def _number(stream: Stream) -> int:
    return int(stream.request_id.rpartition(":")[2])


def _ready(session: Session) -> Ready:
    config, limits = session.executor.config, session.limits
    assert config.page_size and config.max_num_seqs and config.max_num_batched_tokens
    return Ready(
        pid=os.getpid(), target=session.engine.manifest.target, vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len, num_kv_tokens=limits.kv_capacity, page_size=config.page_size,
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens,
        default_params=options(session.engine.default_params()), metrics=session.metrics(),
    )  # fmt: skip
