"""What API and engine process say to each other: typed messages in length-prefixed msgpack frames on a stream socket.

A frame is its length, four bytes with the highest first, then the message: an array that begins with the type's name.
Types are checked as messages are decoded, values by the runtime's own dataclasses; nothing is ever executed. A frame
that is too long, cut off or of no known type raises ChannelError: the reader ends the connection, it does not guess.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Generic, TypeVar

import msgspec

from ...engines.errors import EngineError, RequestError
from ..metrics import Metrics
from ..request import FinishReason, Logprob, SamplingParams

MAX_FRAME = 64 << 20  # bytes; the largest are prompts of millions of tokens, and logprobs (see MAX_POSITIONS)
MAX_POSITIONS = 8192  # tokens in one News: with 20 logprobs each, some 40 bytes apiece, that is 7 MB
_LENGTH = struct.Struct(">I")
_USUAL = SamplingParams()
_encoder = msgspec.msgpack.Encoder()


class ChannelError(EngineError):
    """The other side sent what is no message of this channel."""


class Message(msgspec.Struct, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all that is sent. Requests go by numbers that the API process gives out and never uses twice."""


# -- to the engine -----------------------------------------------------------------------------------------------------


class Submit(Message):
    """Begin a request. params: see `options`. arrival: on `time.monotonic()`, which both processes share."""

    number: int
    token_ids: list[int]
    params: dict[str, Any]
    priority: int
    arrival: float


class Cancel(Message):
    """End a request with "abort"."""

    number: int


class Ping(Message):
    """Asks for a Pong."""


class Measure(Message):
    """Asks for a Snapshot that is taken from now on. Numbers rise."""

    number: int


class Close(Message):
    """Abort what is open, close the engine and exit."""


# -- from the engine ---------------------------------------------------------------------------------------------------


class Ready(Message):
    """The engine is open: what the API has to know of it. kv tokens: room in all pages; page_size: tokens in one."""

    pid: int
    target: str
    vocab_size: int
    max_model_len: int
    num_kv_tokens: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    default_params: dict[str, Any]
    metrics: Metrics


class Failed(Message):
    """The engine cannot be opened, or it broke: a sentence, or before it was ready the whole message. The last word."""

    why: str


class Part(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What one of a request's answers gained. `cumulative` is the sum over the whole answer."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Update(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a request gained since its last Update.

    times: first scheduled, first token, end; on `time.monotonic()`. prompt_logprobs: further positions of the prompt.
    """

    number: int
    parts: list[Part]
    num_cached_tokens: int = 0
    times: tuple[float | None, float | None, float | None] = (None, None, None)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class News(Message):
    """All requests that changed since the last News, normally by one step."""

    updates: list[Update]


class Refused(Message):
    """A request cannot be honoured: the sentence of its RequestError."""

    number: int
    why: str


class Pong(Message):
    """The engine process lives. steps: committed since it opened; working: requests are open."""

    steps: int
    working: bool


class Snapshot(Message):
    """The engine's metrics. answers: the number of the last Measure that came before it was taken, else 0."""

    metrics: Metrics
    answers: int = 0


ToEngine = Submit | Cancel | Ping | Measure | Close
FromEngine = Ready | Failed | News | Refused | Pong | Snapshot

M = TypeVar("M")


def num_positions(update: Update) -> int:
    """Tokens in it, of prompt and answers: what its size depends on."""
    return sum(len(part.token_ids) for part in update.parts) + len(update.prompt_logprobs or ())


def cut(update: Update, most: int = MAX_POSITIONS) -> Iterator[Update]:
    """The same in Updates of at most `most` positions: an answer's text comes first, how it ended comes last."""
    if num_positions(update) <= most:
        yield update
        return
    number, cached, times = update.number, update.num_cached_tokens, update.times
    scores = update.prompt_logprobs or []
    for at in range(0, len(scores), most):
        yield Update(number, [], cached, times, scores[at : at + most])
    for part in update.parts:
        for at in range(0, max(1, len(part.token_ids)), most):
            last = at + most >= len(part.token_ids)
            piece = Part(
                part.index, "" if at else part.text, part.token_ids[at : at + most],
                None if part.logprobs is None else part.logprobs[at : at + most],
                part.cumulative, part.finish_reason if last else None, part.stop_reason if last else None,
            )  # fmt: skip
            yield Update(number, [piece], cached, times)


def options(params: SamplingParams) -> dict[str, Any]:
    """What `SamplingParams(**options)` is made of again, validated again: the fields that are not as they would be."""
    return {f.name: value for f in fields(params) if (value := getattr(params, f.name)) != getattr(_USUAL, f.name)}


def frame(message: Message) -> bytes:
    """The bytes to send. Raises RequestError for values that msgpack has no form for, or that are too many."""
    try:
        body = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError) as error:  # half a surrogate pair in a stop string, say
        raise RequestError(f"The request cannot be passed to the engine: {error}.") from None
    if len(body) > MAX_FRAME:
        raise RequestError(f"The request takes {len(body)} bytes; at most {MAX_FRAME} can be passed to the engine.")
    return _LENGTH.pack(len(body)) + body


class Frames(Generic[M]):
    """Puts the pieces that a socket gives together again. `kinds` is the union of messages that may come."""

    def __init__(self, kinds: Any, max_frame: int = MAX_FRAME):
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kinds)
        self._max_frame = max_frame
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[M]:
        """The messages completed by `data`. Raises ChannelError; what follows on this connection means nothing then."""
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, at)
                if length > self._max_frame:
                    raise ChannelError(f"A frame of {length} bytes came; at most {self._max_frame} are taken.")
                begin = at + _LENGTH.size
                if len(self._buffer) - begin < length:
                    break
                at = begin + length
                yield self._decode(bytes(memoryview(self._buffer)[begin:at]))
        finally:
            del self._buffer[:at]

    def _decode(self, body: bytes) -> M:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ChannelError(f"A frame of {len(body)} bytes came that is no message: {error}.") from None
