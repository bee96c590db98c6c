"""The channel between API and engine process: every message survives the trip, and nothing else gets through."""

import math
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.engines.errors import RequestError
from ingot.runtime.metrics import Latency, Metrics
from ingot.runtime.request import Logprob, SamplingParams
from ingot.runtime.server import channel
from ingot.runtime.server.channel import (
    Cancel,
    ChannelError,
    Close,
    Failed,
    Frames,
    FromEngine,
    Measure,
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

COUNT = st.integers(0, 2**63 - 1)
TOKENS = st.lists(st.integers(0, 200_000), max_size=6)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
REAL = st.floats(allow_nan=False)
MAYBE_REAL = st.none() | REAL
LOGPROBS = st.dictionaries(COUNT, st.builds(Logprob, REAL, st.none() | COUNT, st.none() | TEXT), max_size=3)
PARAMS = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 1000),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 1000), st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.none() | st.integers(10, 10**6),
    min_tokens=st.integers(0, 10),
    stop=st.none() | st.lists(TEXT.filter(bool), max_size=3),
    stop_token_ids=st.none() | TOKENS,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
ENDS = st.sampled_from([None, "stop", "length", "abort", "error"])


@st.composite
def parts(draw):
    tokens = draw(TOKENS)
    logprobs = draw(st.none() | st.lists(LOGPROBS, min_size=len(tokens), max_size=len(tokens)))
    return Part(draw(COUNT), draw(TEXT), tokens, logprobs, draw(REAL), draw(ENDS), draw(st.none() | COUNT | TEXT))


UPDATES = st.builds(
    Update,
    COUNT,
    st.lists(parts(), max_size=3),
    COUNT,
    st.tuples(MAYBE_REAL, MAYBE_REAL, MAYBE_REAL),
    st.none() | st.lists(st.none() | LOGPROBS, min_size=1, max_size=4),
)
TO_ENGINE = st.one_of(
    st.builds(Submit, COUNT, TOKENS, PARAMS.map(options), st.integers(-9, 9), REAL),
    st.builds(Cancel, COUNT),
    st.just(Ping()),
    st.builds(Measure, COUNT),
    st.just(Close()),
)
FROM_ENGINE = st.one_of(
    st.builds(Failed, TEXT),
    st.builds(News, st.lists(UPDATES, max_size=3)),
    st.builds(Refused, COUNT, TEXT),
    st.builds(Pong, COUNT, st.booleans()),
)


def in_pieces(data, sizes):
    at = 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        yield data[at : at + size]
        at += size


@given(st.lists(TO_ENGINE, max_size=4), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_what_the_engine_is_told_arrives_however_it_is_cut(messages, sizes):
    frames = Frames(ToEngine)
    data = b"".join(map(frame, messages))
    arrived = [m for piece in in_pieces(data, sizes) for m in frames.feed(piece)]
    assert list(map(type, arrived)) == list(map(type, messages))
    assert b"".join(map(frame, arrived)) == data


@given(st.lists(FROM_ENGINE, max_size=4), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_what_the_engine_says_arrives_however_it_is_cut(messages, sizes):
    frames = Frames(FromEngine)
    data = b"".join(map(frame, messages))
    arrived = [m for piece in in_pieces(data, sizes) for m in frames.feed(piece)]
    assert arrived == messages


@given(PARAMS)
def test_sampling_parameters_are_the_same_on_the_other_side(params):
    (message,) = Frames(ToEngine).feed(frame(Submit(1, [2], options(params), 0, 0.0)))
    assert SamplingParams(**message.params) == params


def test_structured_outputs_are_the_same_on_the_other_side():
    params = SamplingParams(structured_outputs={"json": {"type": "object"}})
    (message,) = Frames(ToEngine).feed(frame(Submit(1, [2], options(params), 0, 0.0)))
    assert SamplingParams(**message.params) == params


def test_metrics_and_facts_arrive():
    latency = Latency(3, 0.5, 0.4, 0.6, 0.7)
    metrics = _metrics(latency)
    ready = Ready(1, "cpu", 4096, 2048, 100, 16, 8, 512, options(SamplingParams(temperature=0.5)), metrics)
    arrived = list(Frames(FromEngine).feed(frame(ready) + frame(Snapshot(metrics))))
    assert arrived == [ready, Snapshot(metrics)]
    assert SamplingParams(**arrived[0].default_params) == SamplingParams(temperature=0.5)


def _metrics(latency):
    """Every field of a type that it can have, whatever fields there are."""
    info = msgspec.inspect.type_info(Metrics)
    values = {}
    for field in info.fields:
        match field.type:
            case msgspec.inspect.IntType():
                values[field.name] = 3
            case msgspec.inspect.FloatType():
                values[field.name] = 0.25
            case msgspec.inspect.BoolType():
                values[field.name] = True
            case msgspec.inspect.DictType():
                values[field.name] = {"stop": 2}
            case msgspec.inspect.UnionType(types=types) if any(
                isinstance(t, msgspec.inspect.DataclassType) for t in types
            ):
                values[field.name] = latency
            case msgspec.inspect.DataclassType(cls=kind):
                values[field.name] = kind()
            case _:
                values[field.name] = None
    return Metrics(**values)


@given(UPDATES, st.integers(1, 4))
def test_cutting_loses_nothing(update, most):
    pieces = list(cut(update, most))
    assert all(num_positions(piece) <= most for piece in pieces)
    assert all(piece.number == update.number for piece in pieces)
    scores = [score for piece in pieces for score in piece.prompt_logprobs or []]
    assert scores == (update.prompt_logprobs or [])
    for part in {part.index: part for part in update.parts}.values():
        if sum(other.index == part.index for other in update.parts) > 1:
            continue  # an engine never says two things of one answer at once
        mine = [p for piece in pieces for p in piece.parts if p.index == part.index]
        assert "".join(p.text for p in mine) == part.text
        assert [t for p in mine for t in p.token_ids] == part.token_ids
        assert [x for p in mine for x in p.logprobs or []] == (part.logprobs or [])
        assert (mine[-1].finish_reason, mine[-1].stop_reason) == (part.finish_reason, part.stop_reason)
        assert not any(p.finish_reason for p in mine[:-1])


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(data):
    for kinds in (ToEngine, FromEngine):
        try:
            list(Frames(kinds).feed(struct.pack(">I", len(data)) + data))
        except ChannelError:
            pass


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x91" * 100_000,  # arrays in arrays
        msgspec.msgpack.encode(["Nobody", 1]),
        msgspec.msgpack.encode(["Cancel", "one"]),
        msgspec.msgpack.encode(["Cancel", 1, 2]),
        msgspec.msgpack.encode(["Cancel"]),
        msgspec.msgpack.encode({"type": "Cancel", "number": 1}),
        frame(Pong(1, True))[4:],  # of the other direction
    ],
)
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ChannelError, match="no message"):
        list(Frames(ToEngine).feed(struct.pack(">I", len(body)) + body))


def test_an_oversized_frame_is_refused_before_it_is_there():
    frames = Frames(ToEngine, max_frame=1000)
    assert list(frames.feed(frame(Cancel(1)))) == [Cancel(1)]
    with pytest.raises(ChannelError, match="1001 bytes came; at most 1000"):
        list(frames.feed(struct.pack(">I", 1001)))


def test_what_cannot_be_sent_is_the_requests_fault(monkeypatch):
    with pytest.raises(RequestError, match="surrogates"):
        frame(Submit(1, [1], options(SamplingParams(stop="\ud800")), 0, 0.0))
    with pytest.raises(RequestError, match="passed to the engine"):
        frame(Submit(1, [1], {"max_tokens": 2**70}, 0, 0.0))
    monkeypatch.setattr(channel, "MAX_FRAME", 100)
    with pytest.raises(RequestError, match="at most 100"):
        frame(Submit(1, [5] * 200, {}, 0, 0.0))


def test_infinite_logprobs_arrive():
    news = News([Update(1, [Part(0, "", [1], [{1: Logprob(-math.inf)}])])])
    assert list(Frames(FromEngine).feed(frame(news))) == [news]
