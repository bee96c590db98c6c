"""Requests as no client should send them: bytes, JSON and headers at random, through the whole application.

Whatever comes, the answer is a success or OpenAI's error body with a sentence, never a 5xx, and what is refused has not
been admitted. The engine is scripted; requests go into the application as ASGI messages, so that headers and the cuts
of a body are what the test says and not what a client library makes of it.
"""

import asyncio
import json
import random

import pytest
from api_server import CHAT, COMPLETE, CONVERSE, Scripted, api
from hypothesis import example, given, settings
from hypothesis import strategies as st

MAX_BYTES = 20_000
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
VALID = [
    (COMPLETE, {"prompt": "a", "max_tokens": 3, "temperature": 0.5, "stop": ["x"], "logit_bias": {"5": 1.5}}),
    (COMPLETE, {"prompt": [[1, 2], [3]], "n": 2, "seed": 7, "stream": True, "stream_options": {"include_usage": True}}),
    (COMPLETE, {"prompt": [1, 2], "echo": True, "max_tokens": 0, "top_p": 0.9, "user": "u", "metadata": {"a": [1]}}),
    (COMPLETE, {"prompt": "a", "structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}}),
    (CONVERSE, {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}}),
    (CONVERSE, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "content": "b", "tool_call_id": "1"}], "tools": [TOOL], "tool_choice": "none"}),
    (CONVERSE, {"messages": CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ("/tokenize", {"messages": CHAT, "chat_template_kwargs": {"a": 1}, "return_token_strs": True}),
    ("/tokenize", {"prompt": "a b", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]  # fmt: skip
# spliced into the text of a body: what is no JSON, or hardly
PIECES = [
    b"NaN", b"-Infinity", b"1e999", b"-0", b"1e-400", b"0" * 30, b"9" * 5000, b"." + b"3" * 400, b"1" + b"0" * 400,
    b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u0000"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xf0\x9f\x98\x80"', b"\x00",
    b"\xef\xbb\xbf", b'"prompt": null,', b'"prompt": "b",', b'"n": 1, "n": 2,', b'"": {},', b"[" * 70, b'{"a":' * 70,
    b"[[]]", b"{}", b"null", b"true", b"'a'", b"// c", b"/* c */", b",", b":", b'"', b"\\", b"\r\n\t ", b"}{",
    b"18446744073709551616", b'"' + b"\\u00e9" * 50 + b'"',
]  # fmt: skip


@pytest.fixture(scope="module")
def ask(llm):
    """Sends a request and checks what comes back: `ask(path, raw)` -> (status, body)."""
    scripted = Scripted(llm, "x")
    app, room = api(scripted, max_body_bytes=MAX_BYTES)
    with asyncio.Runner() as runner:

        def ask(path, raw, headers=((b"content-type", b"application/json"),), pieces=1, leaves=False):
            sent = []
            step = -(-len(raw) // pieces) or 1
            parts = [raw[i : i + step] for i in range(0, len(raw), step)] or [b""]
            messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
            messages += [] if leaves else [{"type": "http.request", "body": b"", "more_body": False}]
            received = iter(messages)

            async def receive():
                if message := next(received, None):
                    return message
                if not leaves:
                    await asyncio.sleep(60)
                return {"type": "http.disconnect"}

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
                "root_path": "", "scheme": "http", "query_string": b"", "headers": list(headers),
                "client": ("c", 1), "server": ("s", 80),
            }  # fmt: skip
            before = len(room.admitted), len(scripted.asked)
            runner.run(app(scope, receive, send))
            status, body = sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
            assert status in (200, 400, 404, 413, 415, 499), body
            assert room.inside == 0
            if status != 200:
                assert (len(room.admitted), len(scripted.asked)) == before
            if status not in (200, 499):
                (error,) = json.loads(body).values()
                assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
                assert len(error["message"]) > 10 and "\n" not in error["message"] and len(error["message"]) < 1000
                assert (b"content-type", b"application/json") in sent[0]["headers"]
            return status, body

        yield ask


def is_json(raw):
    """Whether a body is a JSON object; Python's reader lets some through that are none, and none the other way."""
    try:
        return isinstance(json.loads(raw.decode(), parse_int=lambda digits: 0), dict)
    except (ValueError, RecursionError):
        return False


def test_the_bodies_that_are_mutated_are_valid(ask):
    for path, body in VALID:
        if "tools" not in body and "chat_template_kwargs" not in body:  # the demo's template has no place for tools
            assert ask(path, json.dumps(body).encode())[0] == 200, body


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(VALID), st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=4),
       st.randoms(use_true_random=False), st.integers(1, 4))  # fmt: skip
def test_mutated_bodies(ask, valid, pieces, rng, cuts):
    path, body = valid
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    for piece in pieces:
        raw = mutated(raw, piece, rng)
    status, _ = ask(path, raw, pieces=cuts)
    assert status != 200 or is_json(raw), raw


def mutated(raw: bytes, piece: bytes, rng: random.Random) -> bytes:
    """`raw` with a piece put in, in place of something or not, mostly where a value or a member begins."""
    starts = [i + 1 for i, byte in enumerate(raw) if byte in b"[{,:"] or [0]
    at = rng.choice(starts) if rng.random() < 0.7 else rng.randrange(len(raw) + 1)
    ends = [i for i in range(at, len(raw)) if raw[i] in b",]}:"] or [len(raw)]
    end = {0: at, 1: ends[0], 2: rng.randrange(at, len(raw) + 1)}[rng.randrange(3)]
    return raw[:at] + piece + raw[end:]


KEYS = st.sampled_from(["type", "name", "role", "content", "text", "json", "regex", "choice", "grammar", "function",
                        "arguments", "schema", "$ref", "5", "\ud800", ""]) | st.text(max_size=4)  # fmt: skip
SCALARS = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
           | st.sampled_from([2**31, 2**63, 2**64, 10**400, "\ud800", "(" * 50, "a{1000000}", "text"]))  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(KEYS, of, max_size=3), max_leaves=8
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(VALID), VALUES, st.randoms(use_true_random=False))
def test_values_of_any_kind_in_any_place(ask, valid, value, rng):
    path, body = valid
    body = json.loads(json.dumps(body))
    here = body
    while True:  # down to any place
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here))) if here else None
        if key is None or not isinstance(here[key], dict | list) or rng.random() < 0.4:
            break
        here = here[key]
    if key is not None:
        here[key] = value
    ask(path, json.dumps(body).encode())


@settings(max_examples=150, deadline=None)
@example(COMPLETE, {"\n": None})  # a name that would break the sentence
@given(st.sampled_from([COMPLETE, CONVERSE, "/tokenize", "/detokenize"]), st.binary(max_size=200) | VALUES)
def test_bodies_that_are_nothing(ask, path, raw):
    raw = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    assert ask(path, raw)[0] == 400


TYPES = [b"application/json", b"Application/JSON ; charset=utf-8", b"application/json;", b"", b"text/plain", b"\xff",
         b"application/jsonp", b"multipart/form-data; boundary=x", b"application/json, text/plain"]  # fmt: skip
LENGTHS = [b"", b"-1", b"1e3", b"0", b"\xb2", b"9" * 30, b"99999", b"20000", b" 5", b"0x10", b"5, 5"]
OTHERS = st.tuples(
    st.sampled_from([b"content-length", b"x-request-id", b"authorization", b"expect", b"accept"]),
    st.binary(max_size=20),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TYPES), st.sampled_from(LENGTHS), st.integers(0, 3 * MAX_BYTES), st.integers(1, 9),
       st.booleans(), st.lists(OTHERS, max_size=2))  # fmt: skip
def test_headers_and_lengths(ask, kind, length, size, cuts, leaves, more):
    raw = b'{"prompt": "a", "max_tokens": 1}'.ljust(size)
    status, body = ask(COMPLETE, raw, [(b"content-type", kind), (b"content-length", length), *more], cuts, leaves)
    if any(name == b"x-request-id" for name, _ in more):
        return
    if kind.partition(b";")[0].strip().lower() != b"application/json":
        assert status == 415
    elif length == b"9" * 30 or length == b"99999" or (size > MAX_BYTES and not leaves):
        assert status == 413, body
    elif leaves:
        assert status in (413, 499)
    else:
        assert status == 200, body
