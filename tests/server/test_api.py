"""The HTTP API over a real engine: plain and streamed answers equal the offline ones; ids, probes, page, document."""

import asyncio

import httpx2
import pytest
from api_server import CHAT, COMPLETE, CONVERSE, NAME, Page, Scripted, api, events
from ingot import LLM, SamplingParams
from starlette.testclient import TestClient

PROMPTS = ["def main():\n", "import os\n\n\ndef read(path):", "class Point:"]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def offline(engine):
    """`LLM.generate` of the same engine."""
    with LLM(engine) as llm:
        yield lambda prompts, **params: llm.generate(prompts, SamplingParams(**params), progress=False)


def post(client, path, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return events(response) if body.get("stream") else response.json()


# -- completions -------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_offline_one(client, offline):
    expected = offline(PROMPTS[:1], **GREEDY)[0]
    found = post(client, "/v1/completions", model=NAME, prompt=PROMPTS[0], **GREEDY)
    assert found["object"] == "text_completion" and found["model"] == NAME and found["id"].startswith("cmpl-")
    (choice,) = found["choices"]
    assert choice["text"] == expected.outputs[0].text and choice["finish_reason"] == "length"
    num = len(expected.prompt_token_ids)
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (num, 24, num + 24)


def test_a_stream_adds_up_to_the_plain_answer(client):
    body = dict(prompt=PROMPTS[1], logprobs=2, echo=True, return_token_ids=True, **GREEDY)
    plain = post(client, "/v1/completions", **body)
    chunks = post(client, "/v1/completions", stream=True, stream_options={"include_usage": True}, **body)
    *chunks, last = chunks
    del last["usage"]["prompt_tokens_details"], plain["usage"]["prompt_tokens_details"]
    assert last["choices"] == [] and last["usage"] == plain["usage"]
    assert all(chunk["usage"] is None for chunk in chunks) and len({chunk["id"] for chunk in chunks}) == 1
    parts = [chunk["choices"][0] for chunk in chunks]
    whole = plain["choices"][0]
    assert "".join(part["text"] for part in parts) == whole["text"]
    joined = {name: [x for part in parts for x in part["logprobs"][name]] for name in whole["logprobs"]}
    for name in ("tokens", "text_offset"):
        assert joined[name] == whole["logprobs"][name]
    assert joined["token_logprobs"] == [pytest.approx(x, abs=1e-4) for x in whole["logprobs"]["token_logprobs"]]
    assert joined["top_logprobs"] == [pytest.approx(x, abs=1e-4) for x in whole["logprobs"]["top_logprobs"]]
    assert [x for part in parts for x in part["token_ids"]] == whole["token_ids"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(client, llm, offline, stream, as_ids):
    prompts = [llm.text.encode(p) for p in PROMPTS] if as_ids else PROMPTS
    expected = [o.outputs[0].text for o in offline(prompts, **GREEDY)]
    started = client.room.num_started
    found = post(client, "/v1/completions", prompt=prompts, n=2, stream=stream, **GREEDY)
    texts = [""] * 6
    for choice in (c["choices"][0] for c in found) if stream else found["choices"]:
        texts[choice["index"]] += choice["text"]
    assert texts == [text for text in expected for _ in range(2)]
    if not stream:
        assert [choice["index"] for choice in found["choices"]] == list(range(6))
        assert found["usage"]["prompt_tokens"] == sum(len(llm.text.encode(p)) for p in PROMPTS)
        assert found["usage"]["completion_tokens"] == 6 * 24
    assert client.room.admitted[-1] == (sum(len(llm.text.encode(p)) for p in PROMPTS), 6)
    assert client.room.num_started == started + 1, "the request stops waiting when all its prompts have"


@pytest.mark.parametrize("path", [COMPLETE, CONVERSE])
def test_answers_that_end_at_different_times_end_once(client, path):
    body = {"n": 6, "seed": 3, "temperature": 1.2, "stop": ["e"], "max_tokens": 30, "stream": True,
            "return_token_ids": True}  # fmt: skip
    body |= {"prompt": PROMPTS[0]} if path == COMPLETE else {"messages": CHAT}
    chunks = post(client, path, stream_options={"include_usage": True, "continuous_usage_stats": True}, **body)
    ends = [c["choices"][0]["index"] for c in chunks[:-1] if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == list(range(6))
    last, lengths = {}, [0] * 6
    for i, chunk in enumerate(chunks[:-1]):
        choice = chunk["choices"][0]
        last[choice["index"]] = choice["finish_reason"]
        lengths[choice["index"]] += len(choice.get("token_ids", ()))
        assert i == 0 or chunk["usage"]["completion_tokens"] >= chunks[i - 1]["usage"]["completion_tokens"]
    assert all(last.values()), "nothing comes after the end"
    assert lengths != sorted(lengths), "the seed is to make their lengths differ"
    assert chunks[-1]["usage"]["completion_tokens"] == chunks[-2]["usage"]["completion_tokens"] > 6


def test_sampling_parameters_reach_the_engine(client, offline):
    options = dict(
        temperature=1.5, seed=11, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.5, logit_bias={"300": 2.0}, max_tokens=20, min_tokens=10, stop=["zzzz"],
        stop_token_ids=[301], ignore_eos=True, skip_special_tokens=False, include_stop_str_in_output=True,
    )  # fmt: skip
    expected = offline(PROMPTS[:1], **options)[0].outputs[0]
    assert post(client, "/v1/completions", prompt=PROMPTS[0], **options)["choices"][0]["text"] == expected.text
    assert expected.text != offline(PROMPTS[:1], **{**options, "seed": 12})[0].outputs[0].text


def test_null_is_the_same_as_nothing(client):
    nulls = dict.fromkeys(("stop", "best_of", "suffix", "user", "stream", "logit_bias", "seed", "response_format"))
    plain = post(client, "/v1/completions", prompt=PROMPTS[0], **GREEDY)
    found = post(client, "/v1/completions", prompt=PROMPTS[0], **GREEDY, **nulls, metadata={"a": "b"}, store=False)
    assert found["choices"] == plain["choices"]


def test_values_that_ask_for_nothing_are_taken(client):
    """What vLLM's and OpenAI's clients send without being asked."""
    nothing = {"best_of": 2, "suffix": "", "use_beam_search": False, "length_penalty": 1.0, "bad_words": []}
    nothing |= {"spaces_between_special_tokens": True, "return_tokens_as_token_ids": False, "cache_salt": None}
    plain = post(client, COMPLETE, prompt=PROMPTS[0], n=2, **GREEDY)
    assert post(client, COMPLETE, prompt=PROMPTS[0], n=2, **GREEDY, **nothing)["choices"] == plain["choices"]
    post(client, COMPLETE, prompt=PROMPTS[0], best_of=1, **GREEDY)
    post(client, CONVERSE, messages=CHAT, n=2, **GREEDY, **nothing)


def test_a_stop_string_ends_the_answer(client, offline):
    text = offline(PROMPTS[:1], **GREEDY)[0].outputs[0].text
    stop = text[5:8]
    choice = post(client, "/v1/completions", prompt=PROMPTS[0], stop=stop, **GREEDY)["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == stop


def test_log_probabilities_are_the_engines(client, offline):
    expected = offline(PROMPTS[:1], logprobs=3, **GREEDY)[0].outputs[0]
    found = post(client, "/v1/completions", prompt=PROMPTS[0], logprobs=3, **GREEDY)["choices"][0]["logprobs"]
    numbers = [entry[t].logprob for t, entry in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert found["token_logprobs"] == pytest.approx(numbers, abs=1e-4)
    for entry, top in zip(expected.logprobs, found["top_logprobs"], strict=True):
        by_text = {}
        for value in sorted(entry.values(), key=lambda v: v.logprob):
            by_text[value.decoded_token] = value.logprob
        assert top == pytest.approx(by_text, abs=1e-4)
    assert "".join(found["tokens"]) == expected.text
    starts = [len("".join(found["tokens"][:i])) for i in range(24)]
    assert found["text_offset"] == starts


def test_log_probabilities_by_token_id(client):
    """Only what tokens are called differs."""
    ask = dict(prompt=PROMPTS[0], echo=True, logprobs=2, return_token_ids=True, **GREEDY)
    plain, found = (
        post(client, COMPLETE, return_tokens_as_token_ids=as_ids, **ask)["choices"][0] for as_ids in (None, True)
    )
    scores, others = found["logprobs"], plain["logprobs"]
    ids = [f"token_id:{token}" for token in found["prompt_token_ids"] + found["token_ids"]]
    assert scores["tokens"] == ids and scores["text_offset"] == others["text_offset"] and found["text"] == plain["text"]
    assert scores["token_logprobs"] == others["token_logprobs"]
    for token, top, number in zip(ids[1:], scores["top_logprobs"][1:], scores["token_logprobs"][1:], strict=True):
        assert top[token] == number and len(top) >= 2 and all(name.startswith("token_id:") for name in top)
    ask = dict(messages=CHAT, logprobs=True, top_logprobs=1, return_token_ids=True, **GREEDY)
    plain, found = (post(client, CONVERSE, return_tokens_as_token_ids=a, **ask)["choices"][0] for a in (None, True))
    ids = [f"token_id:{token}" for token in found["token_ids"]]
    for token, mine, other in zip(ids, found["logprobs"]["content"], plain["logprobs"]["content"], strict=True):
        assert mine["token"] == mine["top_logprobs"][0]["token"] == token
        assert mine["bytes"] == other["bytes"] and mine["logprob"] == other["logprob"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_as_evaluation_harnesses_want(client, llm, offline, max_tokens):
    prompt = "def größe(ü):\n    return 'naïve — 你好'"
    ids = llm.text.encode(prompt)
    expected = offline([ids], temperature=0, max_tokens=1, prompt_logprobs=1, logprobs=1)[0]
    found = post(client, "/v1/completions", prompt=[ids], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    (choice,), scores = found["choices"], found["choices"][0]["logprobs"]
    assert choice["text"] == prompt + expected.outputs[0].text * max_tokens
    assert len(scores["tokens"]) == len(ids) + max_tokens and scores["token_logprobs"][0] is None
    numbers = [entry[t].logprob for t, entry in zip(ids[1:], expected.prompt_logprobs[1:], strict=True)]
    assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(numbers, abs=1e-4)
    assert scores["top_logprobs"][0] is None and all(scores["top_logprobs"][1:])
    assert found["usage"]["completion_tokens"] == max_tokens and choice["finish_reason"] == "length"
    for i, (offset, token) in enumerate(zip(scores["text_offset"], scores["tokens"], strict=True)):
        assert "\ufffd" in token or choice["text"].startswith(token, offset), (i, token)
    assert scores["text_offset"][len(ids) :] == [len(prompt)] * max_tokens


def test_offsets_behind_a_character_that_was_never_completed(client, llm):
    half, rest = llm.text.encode("é")[:1], llm.text.encode("ab")
    found = post(client, "/v1/completions", prompt=half + rest, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert found["text"] == "\ufffdab" and found["logprobs"]["text_offset"][: len(half) + 1] == [0, 1]


@pytest.mark.parametrize("skip", [True, False])
def test_offsets_behind_a_special_token(client, llm, skip):
    """One that the text leaves out takes no room in it."""
    asked = {"max_tokens": 9, "temperature": 0, "ignore_eos": True, "skip_special_tokens": skip}
    asked |= {"logit_bias": {"0": 8}, "frequency_penalty": 2}  # a few of them first, then others
    found = post(client, "/v1/completions", prompt="x = 1\n", echo=True, logprobs=0, **asked)["choices"][0]
    scores, (special,) = found["logprobs"], llm.text.pieces.special & {0}
    assert 0 < scores["tokens"][-9:].count(llm.text.token_text(special)) < 9
    for offset, token in zip(scores["text_offset"], scores["tokens"], strict=True):
        assert found["text"].startswith(token, offset) or (skip and token == llm.text.token_text(special))
    assert scores["text_offset"][-1] <= len(found["text"])


def test_prompt_logprobs_by_token_id(client, llm, offline):
    ids = llm.text.encode(PROMPTS[0])
    expected = offline([ids], temperature=0, max_tokens=1, prompt_logprobs=2)[0].prompt_logprobs
    body = dict(temperature=0, max_tokens=1, prompt_logprobs=2)
    found = post(client, "/v1/completions", prompt=ids, **body)["choices"][0]["prompt_logprobs"]
    assert found[0] is None and len(found) == len(ids)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        numbers = {t: v.logprob for t, v in theirs.items()}
        assert {int(t): v["logprob"] for t, v in mine.items()} == pytest.approx(numbers, abs=1e-4)
    chat = post(client, "/v1/chat/completions", messages=CHAT, **body)
    assert chat["prompt_logprobs"][0] is None and chat["prompt_logprobs"][1]


def test_cached_tokens_are_counted(client):
    prompt = "x = [" + ", ".join(map(str, range(60))) + "]\n"
    first, again = (post(client, "/v1/completions", prompt=prompt, **GREEDY)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]


# -- chat --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_the_offline_one(client, llm, engine, stream):
    with LLM(engine) as sync:
        expected = sync.chat(CHAT, SamplingParams(n=2, logprobs=2, **GREEDY), progress=False)[0]
    body = dict(model=NAME, messages=CHAT, n=2, logprobs=True, top_logprobs=2, temperature=0, max_completion_tokens=24)
    found = post(client, "/v1/chat/completions", stream=stream, **body)
    texts, reasons, scores = ["", ""], [None, None], [[], []]
    if stream:
        first = {}
        for part in (chunk["choices"][0] for chunk in found):
            first.setdefault(part["index"], part["delta"])
            texts[part["index"]] += part["delta"].get("content") or ""
            reasons[part["index"]] = part["finish_reason"]
            scores[part["index"]] += (part["logprobs"] or {"content": []})["content"]
        assert first == {i: {"role": "assistant", "content": ""} for i in range(2)}
    else:
        assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
        texts = [choice["message"]["content"] for choice in found["choices"]]
        reasons = [choice["finish_reason"] for choice in found["choices"]]
        scores = [choice["logprobs"]["content"] for choice in found["choices"]]
        assert found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
        assert found["usage"]["completion_tokens"] == 48
    assert texts == [answer.text for answer in expected.outputs] and reasons == ["length", "length"]
    for answer, content in zip(expected.outputs, scores, strict=True):
        chosen = [entry[t].logprob for t, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert [one["logprob"] for one in content] == pytest.approx(chosen, abs=1e-4)
        for one, entry in zip(content, answer.logprobs, strict=True):
            assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(
                sorted((v.logprob for v in entry.values()), reverse=True), abs=1e-4
            )
            assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]


def test_defaults_are_the_models_and_a_chat_has_no_end_of_its_own(llm):
    for path, body, max_tokens in ((CONVERSE, {"messages": CHAT}, None), (COMPLETE, {"prompt": "a"}, 16)):
        scripted = Scripted(llm, "x")
        with TestClient(api(scripted)[0]) as client:
            assert client.post(path, json={**body, "priority": -3}).status_code == 200
        _, params, _, priority = scripted.asked[0]
        assert params.max_tokens == max_tokens and params.temperature == llm.default_params().temperature
        assert priority == -3


def test_a_chat_ends_where_generation_config_says(llm):
    scripted = Scripted(llm, "x")
    scripted.default_params = lambda: SamplingParams(max_tokens=99)
    with TestClient(api(scripted)[0]) as client:
        for more in ({}, {"max_tokens": 120}):
            assert client.post(CONVERSE, json={"messages": CHAT, **more}).status_code == 200
    assert [params.max_tokens for _, params, _, _ in scripted.asked] == [99, 120]


def test_content_parts_are_joined(client):
    parts = [{"type": "text", "text": "print "}, {"type": "text", "text": "hello"}]
    body = dict(GREEDY)
    one = post(client, "/v1/chat/completions", messages=[{"role": "user", "content": parts}], **body)
    assert one["choices"] == post(client, "/v1/chat/completions", messages=CHAT, **body)["choices"]


# -- the other endpoints -----------------------------------------------------------------------------------------------


def test_models_tokens_and_probes(client, llm):
    card = client.get("/v1/models").json()["data"][0]
    assert card["id"] == NAME and card["max_model_len"] == llm.max_model_len and card["object"] == "model"
    assert client.get(f"/v1/models/{NAME}").json() == card
    ids = llm.text.encode(PROMPTS[1])
    found = post(client, "/tokenize", prompt=PROMPTS[1], return_token_strs=True)
    assert found["tokens"] == ids and found["count"] == len(ids) and "".join(found["token_strs"]) == PROMPTS[1]
    assert post(client, "/detokenize", tokens=ids) == {"prompt": PROMPTS[1]}
    rendered = llm.text.render(CHAT)
    assert post(client, "/tokenize", messages=CHAT)["tokens"] == llm.text.encode(rendered, add_special_tokens=False)
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").status_code == 200
    assert client.get("/metrics").content == Page.text
    assert client.get("/metrics").headers["content-type"].startswith(Page.content_type)
    assert client.get("/version").json()["version"]


def test_the_page_may_load_nothing_from_elsewhere(client):
    for path in ("/", "/page/index.html"):
        response = client.get(path)
        assert response.status_code == 200 and "html" in response.headers["content-type"]
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
    assert client.get("/page/../app.py").status_code == 404


def test_the_document_describes_the_bodies(client):
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, name in (("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatRequest"),
                       ("/tokenize", "TokenizeRequest"), ("/detokenize", "DetokenizeRequest")):  # fmt: skip
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
        assert schemas[name]["additionalProperties"] is False and schemas[name]["properties"]
        assert "400" in operation["responses"]
    properties = schemas["ChatRequest"]["properties"]
    assert properties["top_p"]["anyOf"][0]["maximum"] == 1 and properties["logprobs"]["anyOf"][0]["type"] == "boolean"
    assert schemas["CompletionRequest"]["properties"]["logprobs"]["anyOf"][0] == {
        "type": "integer", "minimum": 0, "maximum": 20}  # fmt: skip
    references = set(_references(document))
    assert references and all(r.removeprefix("#/components/schemas/") in schemas for r in references)


def _references(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_request_ids_are_echoed_and_used(client):
    response = client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "trace-1.2"})
    assert response.headers["x-request-id"] == "trace-1.2" and response.json()["id"] == "cmpl-trace-1.2"
    assert post(client, "/v1/completions", prompt="a", request_id="mine")["id"] == "cmpl-mine"
    assert post(client, CONVERSE, messages=CHAT, max_tokens=1, request_id="mine")["id"] == "chatcmpl-mine"
    for bad in ("a b", "x" * 129, "é"):
        response = client.get("/version", headers={"X-Request-Id": bad.encode("latin-1")})
        assert response.status_code == 400 and "X-Request-Id" in response.json()["error"]["message"]


def test_one_request_id_may_be_used_by_two_requests_at_once(llm):
    app, _ = api(llm)

    async def both():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
            calls = [
                client.post("/v1/completions", json={"prompt": p, **GREEDY}, headers={"X-Request-Id": "same"})
                for p in PROMPTS
            ]
            return await asyncio.gather(*calls)

    assert [response.status_code for response in asyncio.run(both())] == [200] * 3
