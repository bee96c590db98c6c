"""What the HTTP API turns down: every refusal with its status and sentence, before and within a stream; never a 500."""

import gzip
import json
import logging
import time

import pytest
from api_server import CHAT, COMPLETE, CONVERSE, Room, Scripted, api, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.engines.errors import EngineError
from ingot.runtime.server.body import REFUSED
from ingot.runtime.server.protocol import ChatRequest, CompletionRequest
from ingot.runtime.server.security import MAX_JSON_DEPTH, check_depth
from starlette.testclient import TestClient

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
REFUSALS = [
    (COMPLETE, {}, 400, "prompt is missing", "prompt"),
    (COMPLETE, {"prompt": ""}, 400, "The prompt is empty", "prompt"),
    (COMPLETE, {"prompt": []}, 400, "at least one prompt", "prompt"),
    (COMPLETE, {"prompt": [[]]}, 400, "The prompt is empty", "prompt"),
    (COMPLETE, {"prompt": 1.5}, 400, "prompt is 1.5; it must be a string, a list of strings", "prompt"),
    (COMPLETE, {"prompt": [1, "a"]}, 400, "it must be a string, a list of strings", "prompt"),
    (COMPLETE, {"prompt": [4096]}, 400, "unknown tokens; the model's are 0 to 4095", "prompt"),
    (COMPLETE, {"prompt": [-1]}, 400, "unknown tokens", "prompt"),
    (COMPLETE, {"prompt": "a " * 5000}, 400, "tokens; the context holds 4096", "prompt"),
    (COMPLETE, {"prompt": "a", "model": "gpt-5"}, 404, "The model 'gpt-5' does not exist", "model"),
    (COMPLETE, {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported", "suffix"),
    (COMPLETE, {"prompt": "a", "best_of": 2}, 400, "best_of is not supported; use n", "best_of"),
    (COMPLETE, {"prompt": "a", "best_of": True}, 400, "best_of is not supported; use n", "best_of"),
    (COMPLETE, {"prompt": "a", "spaces_between_special_tokens": False}, 400, "can only be true",
     "spaces_between_special_tokens"),
    (CONVERSE, {"messages": CHAT, "cache_salt": "a"}, 400, "cache_salt is not supported", "cache_salt"),
    (CONVERSE, {"messages": CHAT, "length_penalty": 0.5}, 400, "length_penalty is not supported", "length_penalty"),
    (CONVERSE, {"messages": CHAT, "request_id": "a b"}, 400, "request_id is 'a b'; it must have", "request_id"),
    (COMPLETE, {"prompt": "a", "max_token": 2}, 400, "did you mean max_tokens?", "max_token"),
    (COMPLETE, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0", "max_tokens"),
    (COMPLETE, {"prompt": "a", "n": 17}, 400, "n is 17; this server allows at most 16", "n"),
    (COMPLETE, {"prompt": "a", "n": "2"}, 400, "n is '2'; it should be a valid integer", "n"),
    (COMPLETE, {"prompt": "a", "n": True}, 400, "n is True", "n"),
    (COMPLETE, {"prompt": "a", "temperature": -1}, 400, "temperature is -1", "temperature"),
    (COMPLETE, {"prompt": "a", "top_p": 0}, 400, "top_p is 0", "top_p"),
    (COMPLETE, {"prompt": "a", "top_k": 10**30}, 400, "top_k is 1000", "top_k"),
    (COMPLETE, {"prompt": "a", "logprobs": 21}, 400, "logprobs is 21", "logprobs"),
    (COMPLETE, {"prompt": "a", "min_tokens": 17}, 400, "min_tokens is 17; it must not exceed", "min_tokens"),
    (CONVERSE, {"messages": CHAT, "min_tokens": 10**6}, 400, "the context holds 4096", "min_tokens"),
    (COMPLETE, {"prompt": "a", "repetition_penalty": 1e-300}, 400, "repetition_penalty is", "repetition_penalty"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"3": 1, "x": 1}}, 400, "logit_bias has the key 'x'; its", "logit_bias"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"3": 1, "4": "y"}}, 400, "logit_bias['4'] is 'y'; it must", "logit_bias"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"3": True}}, 400, "logit_bias['3'] is True; it must be", "logit_bias"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"5000": 1}}, 400, "names token 5000", "logit_bias"),
    (COMPLETE, {"prompt": "a", "stop": [""]}, 400, "stop", "stop"),
    (COMPLETE, {"prompt": "a", "stop": ["x"] * 65}, 400, "at most 64", "stop"),
    (COMPLETE, {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "set stream", "stream_options"),
    (COMPLETE, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, 400, "does not go with", "prompt_logprobs"),
    (COMPLETE, {"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "belongs to the type",
     "response_format"),
    (COMPLETE, {"prompt": "a", "guided_json": {}}, 400, "use structured_outputs", "guided_json"),
    (COMPLETE, {"prompt": "a", "structured_outputs": {"regex": "["}}, 400, "regex of structured_outputs", None),
    (COMPLETE, {"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, 400,
     "send one of them", "structured_outputs"),
    (COMPLETE, {"prompt": "a", "structured_outputs": {"json": {"not": {}}}}, 400, '"not"', None),
    (COMPLETE, {"prompt": "a", "structured_outputs": {"regex": "a"}, "ignore_eos": True}, 400, "ignore_eos", None),
    (COMPLETE, {"prompt": "a", "chat_template": "{{1}}"}, 400, "chat_template is not accepted", "chat_template"),
    (CONVERSE, {"messages": []}, 400, "messages", "messages"),
    (CONVERSE, {"messages": [*CHAT, {"content": "a"}]}, 400, "messages[1].role is missing", "messages[1].role"),
    (CONVERSE, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400,
     "messages[0].content has a part that is no text", "messages[0].content"),
    (CONVERSE, {"messages": CHAT, "tools": [TOOL]}, 400, "no place for tools", "tools"),
    (CONVERSE, {"messages": CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}},
     400, "must name one of the tools", "tool_choice"),
    (CONVERSE, {"messages": CHAT, "tools": [TOOL], "tool_choice": "required", "response_format":
                {"type": "json_object"}}, 400, "exclude each other", "tool_choice"),
    (CONVERSE, {"messages": CHAT, "tool_choice": "auto"}, 400, "there are no tools", "tool_choice"),
    (CONVERSE, {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, 400,
     "tools[0].function.strict needs", "tools[0].function.strict"),
    (CONVERSE, {"messages": CHAT, "functions": []}, 400, "use tools", "functions"),
    (CONVERSE, {"messages": CHAT, "top_logprobs": 2}, 400, "set logprobs to true", "top_logprobs"),
    (CONVERSE, {"messages": CHAT, "logprobs": 2}, 400, "logprobs is 2", "logprobs"),
    (CONVERSE, {"messages": CHAT, "max_tokens": 1, "max_completion_tokens": 2}, 400, "send one of them",
     "max_completion_tokens"),
    (CONVERSE, {"messages": CHAT, "reasoning_effort": "low"}, 400, "no reasoning_effort", "reasoning_effort"),
    (CONVERSE, {"messages": CHAT, "chat_template_kwargs": {"template": "{{ 1 }}"}}, 400, "not for it to set",
     "chat_template_kwargs"),
    (CONVERSE, {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": {}}}, 400,
     "name is missing", "response_format.json_schema.name"),
    ("/tokenize", {}, 400, "a prompt or messages", "prompt"),
    ("/detokenize", {"tokens": [5000]}, 400, "unknown tokens", None),
    ("/detokenize", {"tokens": [10**40]}, 400, "tokens", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "sentence", "param"), REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_names_what_is_wrong(client, path, body, status, sentence, param, stream):
    if stream and path.startswith("/v1/") and "stream_options" not in body:
        body = {**body, "stream": True}
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert response.status_code == status and sentence in error["message"], error
    assert error["message"].endswith((".", "?")) and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"{", "not valid JSON"), (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"), (b"1", "must be a JSON object"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"), (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}", "nests deeper than 64"),
        (b'{"prompt": ' + b"[" * 100000, "nests deeper than 64"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature is NaN, which is not a number; it should be a finite"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature is inf; it should be a finite number less than"),
        (b'{"prompt": "a", "top_p": NaN}', "top_p is NaN, which is not a number; it must be a finite number above 0"),
        (b'{"prompt": "a", "logit_bias": {"7": NaN}}', "logit_bias['7'] is NaN, which is not a number"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", ""),
    ],
)  # fmt: skip
def test_malformed_bodies(client, raw, sentence):
    response = client.post("/v1/completions", content=raw)
    assert response.status_code == 400 and sentence in response.json()["error"]["message"], response.text


def test_the_depth_of_json_is_that_outside_of_strings():
    check_depth(json.dumps({"prompt": "[{" * 1000 + '\\"[['}).encode())
    nested = b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH
    check_depth(nested)
    with pytest.raises(Exception, match="nests deeper"):
        check_depth(b"[" + nested + b"]")
    began = time.thread_time()
    check_depth(b'"' + b'\\"[' * 1_000_000)  # a string that never ends
    assert time.thread_time() - began < 2


def test_bodies_that_are_too_large_or_of_another_kind(llm):
    app, room = api(llm, max_body_bytes=1000)
    with TestClient(app) as client:
        for content in (json.dumps({"prompt": "a" * 2000}), (b"x" * 100 for _ in range(20))):
            response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413 and "1000 bytes" in response.json()["error"]["message"]
        response = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
        assert response.status_code == 415 and "text/plain" in response.json()["error"]["message"]
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        response = client.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=packed)
        assert response.status_code == 415 and "'gzip'" in response.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    assert len(room.admitted) == 1


def test_unknown_paths_and_methods(client):
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/x", 404)):
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"], response.text


def test_api_keys(llm):
    app, _ = api(llm, api_keys=("first", "sécond"))
    with TestClient(app) as client:
        for value in ("", "Bearer third", "first", "Basic first", "Bearer ", "Bearer firs", "Bearer first first"):
            response = client.post("/v1/completions", json={"prompt": "a"}, headers={"Authorization": value})
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/tokenize", "/v1/nowhere", "//v1/models", "/page"):
            assert client.get(path).status_code == 401
        for key in ("first", "sécond"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert client.get("/v1/models", headers=headers).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/version", "/", "/openapi.json"):
            assert client.get(path).status_code == 200
    for key in ("", "third "):  # what "Bearer " would open, and what no header can
        with pytest.raises(EngineError, match="API key is empty, or has blanks around it"):
            api(llm, api_keys=("first", key))


def test_other_origins_only_where_allowed(llm):
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for origins, allowed in (((), False), (("https://b.example",), False), (("https://a.example",), True)):
        app, _ = api(llm, allowed_origins=origins, api_keys=("k",))
        with TestClient(app) as client:
            response = client.options("/v1/completions", headers=preflight)
            assert ("access-control-allow-origin" in response.headers) == allowed
            refusal = client.get("/v1/models", headers={"Origin": "https://a.example"})
            assert refusal.status_code == 401 and ("access-control-allow-origin" in refusal.headers) == allowed


@pytest.mark.parametrize("stream", [False, True])
def test_no_room_is_said_with_a_time(llm, stream):
    room = Room()
    app, _ = api(llm, room)
    with TestClient(app) as client:
        room.refusal = refused(429, "The server is full.", 7)
        response = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
        assert response.status_code == 429 and response.headers["retry-after"] == "7"
        assert response.json()["error"] == {
            "message": "The server is full.", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
        }  # fmt: skip
        room.accepting = False
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


class Broken(Scripted):
    healthy = False

    def check(self):
        raise EngineError("The engine failed in a step (Boom).")


def test_a_broken_engine(llm):
    app, _ = api(Broken(llm, EngineError("The engine failed in a step (Boom).")))
    with TestClient(app) as client:
        for path in ("/health", "/ready"):
            response = client.get(path)
            assert response.status_code == 503 and "Boom" in response.json()["error"]["message"]
        for stream in (False, True):
            response = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
            assert response.status_code == 503 and response.json()["error"]["code"] == "engine_unavailable"


def test_a_bug_is_logged_and_not_told(llm, caplog):
    app, room = api(Scripted(llm, ValueError("secret")))
    with TestClient(app) as client, caplog.at_level(logging.ERROR):
        for stream in (False, True):
            caplog.clear()
            response = client.post("/v1/completions", json={"prompt": "a", "stream": stream})
            assert response.status_code == 500 and "secret" not in response.text
            assert response.headers["x-request-id"] and "secret" in caplog.text
    assert room.inside == 0


@pytest.mark.parametrize("path", [COMPLETE, CONVERSE])
def test_an_error_in_mid_stream_is_an_event_and_the_end(llm, path):
    app, room = api(Scripted(llm, "some", " text", EngineError("The engine failed in a step (Boom).")))
    body = {"prompt": "a"} if path == COMPLETE else {"messages": CHAT}
    with TestClient(app) as client:
        response = client.post(path, json={**body, "stream": True})
        assert response.status_code == 200
        blocks = [json.loads(block.removeprefix("data: ")) for block in response.text.split("\n\n")[:-1]]
        assert "Boom" in blocks[-1]["error"]["message"] and "[DONE]" not in response.text and len(blocks) >= 3
    assert room.inside == 0


# -- anything at all ---------------------------------------------------------------------------------------------------

FIELDS = [*CompletionRequest.model_fields, *ChatRequest.model_fields, *REFUSED, "nonsense"]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 30),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30), 1e-320, 1e308, 0.5]),
    st.sampled_from(["", "a", "none", "auto", "\x00", "\u2028", "{{ 7 * 7 }}", "<|end|>", "text"]),
    st.lists(st.one_of(st.integers(-1, 4100), st.sampled_from(["", "a"]), st.lists(st.integers(0, 9), max_size=2),
                       st.just({"type": "function", "function": {"name": "f"}}), st.just(CHAT[0])), max_size=3),
    st.dictionaries(st.sampled_from(["type", "1", "-1", "4096", "include_usage", "content", "9" * 400]),
                    st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.none()), max_size=3),
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([COMPLETE, CONVERSE, "/tokenize", "/detokenize"]),
       st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.booleans())  # fmt: skip
def test_no_body_makes_the_server_fail(client, llm, path, body, valid):
    if valid:  # otherwise hardly any body gets as far as the engine
        body = (
            {"prompt": "a", "max_tokens": 2, **body}
            if path == COMPLETE
            else {"messages": CHAT, "max_tokens": 2, **body}
        )
    if body.get("max_tokens", 0) is None:
        del body["max_tokens"]
    response = client.post(path, content=json.dumps(body))  # with Infinity, which is no JSON
    assert response.status_code in (200, 400, 404), response.text
    assert llm.healthy
    if response.status_code != 200:
        assert response.json()["error"]["message"].count("\n") == 0
