"""The engine process: `python -m ingot.runtime.server.child SOCKET SETTING`, started by supervisor.py alone.

SOCKET is the number of an inherited socket, SETTING a JSON object of the engine's folder and its ServeConfig options.
One thread reads the socket, the session's runs steps, the main one writes. What is not yet written is kept per request,
never per message: while the API is slow, answers grow in their streams and go out together, in one message.
The API's end closes with the API process: whatever this one is doing, it exits then, and the GPU is free.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ...engines.errors import EngineError, RequestError
from ..capacity import ServeConfig
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
BROKEN = 3  # exit code after Failed
_RECEIVE = 1 << 16  # bytes read at a time
_PR_SET_PDEATHSIG = 1


class _Due(NamedTuple):
    """What is to be written next."""

    streams: list[Stream]
    refused: dict[int, str]
    pong: bool
    snapshot: bool
    fault: str | None
    closing: bool


class Service:
    """A session served over a socket. `listen` runs in a thread of its own, `serve` in the main one."""

    def __init__(self, sock: socket.socket):
        self._socket = sock
        self._session: Session | None = None
        self._opened = threading.Event()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="ingot-compile")
        self._turn = threading.Condition()  # guards all below; notified when there is something to write
        self._compiling: set[int] = set()  # requests that are not with the session yet
        self._called_off: set[int] = set()  # those of them that were cancelled
        self._changed: dict[Stream, None] = {}
        self._refused: dict[int, str] = {}
        self._pong = self._closing = False
        self._asked = self._answered = 0  # numbers of Measures
        self._fault: str | None = None  # why the channel cannot be used any more
        self._stale = False  # something happened since the last snapshot
        self._next_snapshot = 0.0  # on time.monotonic()
        self._num_scored: dict[Stream, int] = {}  # prompt_logprobs written

    # -- the reading thread --------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Carry out what the API sends; when its end is closed, exit at once."""
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
            os._exit(0)

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except ConnectionError:
            return b""

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Close) and not self._opened.is_set():
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
                    session.cancel(str(message.number))
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
            stream = session.prepare(message.token_ids, params, self.changed, str(message.number), message.priority)
            for answer in stream.answers:
                answer.request.metrics.arrival = message.arrival
            with self._turn:
                session.submit([stream])
                if message.number in self._called_off:
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

    def _give_up(self, fault: str) -> None:
        with self._turn:
            self._fault = fault
            self._turn.notify()

    # -- the session's thread ------------------------------------------------------------------------------------------

    def changed(self, streams: Sequence[Stream]) -> None:
        """The session's listener: nothing is copied here, a stream that is already due stays so."""
        with self._turn:
            self._changed.update(dict.fromkeys(streams))
            self._stale = True
            self._turn.notify()

    # -- the main thread -----------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Write a message, waiting until the socket has taken it; if nobody can read it any more, exit."""
        try:
            self._socket.sendall(frame(message))
        except ConnectionError:
            os._exit(0)

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
                return BROKEN
            if due.pong:
                self.send(Pong(*session.progress))
            if due.snapshot:
                self._snapshot(session)
            if due.closing:
                session.close()
                return 0

    def _next(self) -> _Due:
        """Waits until something is due."""
        with self._turn:
            while True:
                now = time.monotonic()
                snapshot = self._asked > self._answered or (self._stale and now >= self._next_snapshot)
                if self._changed or self._refused or self._pong or self._closing or self._fault or snapshot:
                    break
                self._turn.wait(self._next_snapshot - now if self._stale else None)
                if self._session and self._session.failure:
                    break
            due = _Due(list(self._changed), self._refused, self._pong, snapshot, self._fault, self._closing)
            self._changed, self._refused, self._pong = {}, {}, False
            if snapshot:
                self._answered, self._stale = self._asked, False
            return due

    def _snapshot(self, session: Session) -> None:
        working = session.progress[1]
        self.send(Snapshot(session.metrics(), self._answered))
        with self._turn:
            self._stale |= working  # pages are given back after the last token, so there will be one more
            self._next_snapshot = time.monotonic() + METRICS_EVERY

    def _news(self, streams: list[Stream], refused: dict[int, str]) -> Iterator[News]:
        """All that is new, in messages of at most MAX_POSITIONS tokens. The scheduler's refusals go into `refused`."""
        batch: list[Update] = []
        room = MAX_POSITIONS
        for stream in streams:
            if stream.error is not None:
                if isinstance(stream.error, RequestError):
                    refused[int(stream.request_id)] = str(stream.error)
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
        return Update(int(stream.request_id), parts, output.num_cached_tokens, times, list(scores) if scores else None)


def _ready(session: Session) -> Ready:
    config, limits = session.executor.config, session.limits
    assert config.page_size and config.max_num_seqs and config.max_num_batched_tokens
    return Ready(
        pid=os.getpid(), target=session.engine.manifest.target, vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len, num_kv_tokens=limits.kv_capacity, page_size=config.page_size,
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens,
        default_params=options(session.engine.default_params()), metrics=session.metrics(),
    )  # fmt: skip


def _die_with_parent() -> None:
    """Linux kills this process with its parent, even where a stuck thread keeps Python from reading the socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    """Open the engine and serve it. Returns the exit code: 0 when told to close, else BROKEN."""
    number, setting = arguments
    _die_with_parent()
    faulthandler.enable()
    for name in (signal.SIGINT, signal.SIGTERM):  # they are meant for the API, which may still drain
        signal.signal(name, signal.SIG_IGN)
    sock = socket.socket(fileno=int(number))
    sock.set_inheritable(False)
    service = Service(sock)
    threading.Thread(target=service.listen, name="ingot-listen", daemon=True).start()
    try:
        given = json.loads(setting)
        session = Session(given["engine"], ServeConfig(**given["options"]))
    except Exception as error:
        known = isinstance(error, EngineError)
        if not known:
            traceback.print_exc()
        service.send(Failed(str(error) if known else f"The engine cannot be opened ({type(error).__name__}: {error})."))
        return BROKEN
    return service.serve(session)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
