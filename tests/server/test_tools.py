"""Reasoning and tool calls in answers: the formats, what is no call, and that the cut of the stream does not matter."""

import asyncio
import json
import time
from copy import copy

import pytest
from api_server import CHAT, CONVERSE, TEMPLATE, Scripted, api, cast, events
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot import AsyncLLM
from ingot.runtime.server.reasoning import ReasoningReader
from ingot.runtime.server.tools import Call, ToolReader
from starlette.testclient import TestClient

NAMES = ("get_weather", "add")
HERMES = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
WEATHER = ("get_weather", {"city": "Zürich"})
ADD = ("add", {"a": 1, "b": [2]})

# text -> the parts: a string is text, a pair a call
CASES = {
    HERMES: [WEATHER],
    "Let me see.\n\n" + HERMES + "\n": ["Let me see.", WEATHER],
    HERMES + '\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2]}}</tool_call>': [WEATHER, ADD],
    HERMES + "\nand that is it": [WEATHER, "and that is it"],
    # the closing tag left out, and within an argument
    HERMES.removesuffix("</tool_call>"): [WEATHER],
    '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>"}}</tool_call>': [("add", {"a": "</tool_call>"})],
    # arguments as a string; none at all
    '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>': [("add", {"a": 1})],
    '<tool_call>{"name": "add"}</tool_call>': [("add", {})],
    # Llama 3
    '{"name": "get_weather", "parameters": {"city": "Zürich"}}': [WEATHER],
    '<|python_tag|>{"type": "function", "name": "add", "parameters": {"a": 1, "b": [2]}}': [ADD],
    '\n{"name": "add", "parameters": {"a": 1, "b": [2]}}; {"name": "get_weather", "parameters": {"city": "Zürich"}}':
        [ADD, WEATHER],
    '{"type": "function", "function": {"name": "add", "parameters": {"a": 1, "b": [2]}}}': [ADD],
    # Mistral, both ways
    '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": [2]}}, {"name": "add", "arguments": {}}]':
        [ADD, ("add", {})],
    '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Zürich"}}]': [WEATHER],
    'Yes. [TOOL_CALLS]add[ARGS]{"a": 1, "b": [2]}[TOOL_CALLS]get_weather[CALL_ID]abc123XYZ[ARGS]{"city": "Zürich"}':
        ["Yes.", ADD, WEATHER],
    # no calls: they stay text, to the letter
    "plain text, with { and [ and < in it ": ["plain text, with { and [ and < in it "],
    '{"answer": 42}': ['{"answer": 42}'],
    '{"name": "Ann", "arguments": 3}': ['{"name": "Ann", "arguments": 3}'],
    '<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>':
        ['<tool_call>{"name": "rm_rf", "arguments": {}}</tool_call>'],
    "<tool_call>not json</tool_call> more": ["<tool_call>not json</tool_call> more"],
    '<tool_call>{"name": "add", "arguments": {"a": ': ['<tool_call>{"name": "add", "arguments": {"a": '],
    '{"name": "add", "parameters": {"a": NaN}}': ['{"name": "add", "parameters": {"a": NaN}}'],
    '{"name": "add", "parameters": {"a": 1e999}}': ['{"name": "add", "parameters": {"a": 1e999}}'],
    # half a character, as an escape
    '{"name": "add", "parameters": {"a": "\\ud800"}}': [("add", {"a": "\ud800"})],
    "[TOOL_CALLS]": ["[TOOL_CALLS]"],
    "[TOOL_CALLS]nothing here": ["[TOOL_CALLS]nothing here"],
    "<tool_call>" + "[" * 100000: ["<tool_call>" + "[" * 100000],
    "": [],
}  # fmt: skip


def parts_of(pieces):
    """Calls as pairs, neighbouring texts joined."""
    parts = []
    for piece in pieces:
        if isinstance(piece, Call):
            parts.append((piece.name, json.loads(piece.arguments)))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += piece
        else:
            parts.append(piece)
    return parts


def read(reader, pieces):
    found = [part for piece in pieces for part in reader.push(piece)]
    return found + reader.push("", final=True)


@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:50])
def test_calls_are_found_however_the_text_is_cut(text):
    assert parts_of(ToolReader(NAMES).push(text, final=True)) == CASES[text]
    sizes = (1, 2, 3, 7, 50) if len(text) < 1000 else (1000,)
    for size in sizes:
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert parts_of(read(ToolReader(NAMES), pieces)) == CASES[text], size


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", HERMES,
        '{"name": "add", "parameters": {}}', '"', "{", "}", "[", ";", "\n", " ", "add", "x", "<", "</th"]  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.sampled_from(TAGS), max_size=12), st.data())
def test_any_text_reads_the_same_in_any_pieces(tags, data):
    text = "".join(tags)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parts_of(read(ToolReader(NAMES), pieces)) == parts_of(ToolReader(NAMES).push(text, final=True))
    for begun in (False, True):
        joined = {"reasoning": "", "content": ""}, {"reasoning": "", "content": ""}
        for piece in ReasoningReader(begun).push(text, final=True):
            joined[0][piece.kind] += piece.text
        reader = ReasoningReader(begun)
        for piece in [p for t in pieces for p in reader.push(t)] + reader.push("", final=True):
            joined[1][piece.kind] += piece.text
        assert joined[0] == joined[1]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_text_without_a_call_is_left_as_it_is(tags):
    text = "".join(tags)
    found = ToolReader(()).push(text, final=True)
    assert "".join(found) == text


LONG = ['<tool_call>{"name": "' + "</tool_call>" * 2000, "[TOOL_CALLS]a" + " " * 20000, " " * 20000, "<think>\n" * 2000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:20])
def test_no_text_takes_long(text):
    began = time.thread_time()
    for reader in (ToolReader(NAMES), ReasoningReader()):
        read(reader, [text[i : i + 8] for i in range(0, len(text), 8)])
    assert time.thread_time() - began < 3


def test_text_goes_out_at_once():
    reader = ToolReader(NAMES)
    assert reader.push("Hello, wor") == ["Hello, wor"]
    assert reader.push("ld <tool") == ["ld"], "what may be a tag waits, and the space before it"
    assert reader.push("s") == [" <tools"]
    assert reader.push(HERMES)[-1][1:] == ("get_weather", '{"city": "Zürich"}'), "a call goes out when it is complete"


@pytest.mark.parametrize(
    ("begun", "text", "reasoning", "content"),
    [
        (False, "<think>\nhm, 2+2\n</think>\n\n4", "hm, 2+2", "4"),
        (False, "\n<think>a</think>b", "a", "b"),
        (True, "hm\n</think>\n\n4", "hm", "4"),
        (True, "<think>hm</think>4", "hm", "4"),
        (True, "cut off", "cut off", ""),
        (False, "4 </think> 5", "", "4 </think> 5"),
        (False, "\n\n4\n", "", "\n\n4\n"),
        (False, "<think>\n\n</think>\n\nyes", "", "yes"),
    ],
)
def test_reasoning_is_split_off(begun, text, reasoning, content):
    for size in (1, 3, 100):
        reader, found = ReasoningReader(begun), {"reasoning": "", "content": ""}
        for i in range(0, len(text), size):
            for piece in reader.push(text[i : i + size]):
                found[piece.kind] += piece.text
        for piece in reader.push("", final=True):
            found[piece.kind] += piece.text
        assert found == {"reasoning": reasoning, "content": content}, size


# -- through the API ---------------------------------------------------------------------------------------------------

ASK = [{"role": "user", "content": "the weather?"}]
TOOLS = [
    {"type": "function", "function": {"name": n, "description": n, "parameters": {"type": "object"}}} for n in NAMES
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    llm = AsyncLLM(cast(tmp_path_factory.mktemp("engines") / "tools", TEMPLATE))
    yield llm
    asyncio.run(llm.close())


def chat(llm, text, size=4, **body):
    """The message and reason of an answer that says `text`, streamed and plain: both must say the same."""
    scripted = Scripted(llm, *(text[i : i + size] for i in range(0, len(text), size)))
    app, _ = api(scripted)
    with TestClient(app) as client:
        plain = client.post("/v1/chat/completions", json={"messages": ASK, **body})
        assert plain.status_code == 200, plain.text
        (choice,) = plain.json()["choices"]
        streamed = {"content": "", "reasoning_content": "", "tool_calls": []}
        for chunk in events(client.post("/v1/chat/completions", json={"messages": ASK, "stream": True, **body})):
            delta = chunk["choices"][0]["delta"]
            for name in ("content", "reasoning_content"):
                streamed[name] += delta.get(name, "")
            streamed["tool_calls"] += delta.get("tool_calls", [])
            reason = chunk["choices"][0]["finish_reason"]
    message = choice["message"]
    assert (message["content"] or "") == streamed["content"] and reason == choice["finish_reason"]
    assert message.get("reasoning_content", "") == streamed["reasoning_content"]
    calls = message.get("tool_calls", [])
    assert [call["function"] for call in calls] == [call["function"] for call in streamed["tool_calls"]]
    assert [call["index"] for call in streamed["tool_calls"]] == list(range(len(calls)))
    return message, reason, scripted.asked[0]


def test_a_tool_call_in_an_answer(llm):
    message, reason, asked = chat(llm, "<think>\nhm\n</think>\n\nI look.\n" + HERMES, tools=TOOLS)
    assert reason == "tool_calls" and message["content"] == "I look." and message["reasoning_content"] == "hm"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == WEATHER
    assert "get_weather" in asked[0]["prompt"], "the template is given the tools"


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_in_a_call_can_be_sent(llm, choice, stream):
    said = '{"name": "add", "arguments": {"a": "é\\ud800"}}'
    with TestClient(api(Scripted(llm, f"[{said}]" if choice == "required" else said))[0]) as client:
        tools = [{"type": "function", "function": {"name": "add"}}]
        body = {"messages": CHAT, "tools": tools, "tool_choice": choice, "stream": stream}
        response = client.post(CONVERSE, json=body)
    parts = [event["choices"][0]["delta"] for event in events(response)] if stream else [
        response.json()["choices"][0]["message"]]  # fmt: skip
    (call,) = [call for part in parts for call in part.get("tool_calls", ())]
    assert json.loads(call["function"]["arguments"]) == {"a": "é\ud800"}


def test_an_answer_of_calls_only_has_no_content(llm):
    message, reason, _ = chat(llm, HERMES + HERMES, tools=TOOLS)
    assert message["content"] is None and len(message["tool_calls"]) == 2 and reason == "tool_calls"
    message, _, _ = chat(llm, HERMES + HERMES, tools=TOOLS, parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1


def test_mistral_gets_ids_as_its_templates_want_them(llm):
    message, _, _ = chat(llm, '[TOOL_CALLS]add[ARGS]{"a": 1}', tools=TOOLS)
    (call,) = message["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()


def test_tool_choice_none_offers_no_tools(llm):
    message, reason, asked = chat(llm, HERMES, tools=TOOLS, tool_choice="none")
    assert message["content"] == HERMES and "tool_calls" not in message and reason == "stop"
    assert "get_weather" not in asked[0]["prompt"]


def test_without_tools_a_call_is_text(llm):
    message, reason, _ = chat(llm, HERMES)
    assert message["content"] == HERMES and reason == "stop"


def test_the_template_opens_the_reasoning(llm):
    message, _, asked = chat(llm, "hm\n</think>\n\nyes", chat_template_kwargs={"thinking": True})
    assert asked[0]["prompt"].endswith("<think>\n")
    assert message["reasoning_content"] == "hm" and message["content"] == "yes"


def test_reasoning_effort_goes_to_a_template_that_has_it(llm):
    _, _, asked = chat(llm, "yes", reasoning_effort="high")
    assert "effort high" in asked[0]["prompt"]


def test_earlier_calls_and_results_go_back_to_the_template(llm):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_1", "content": "3"}]  # fmt: skip
    _, _, asked = chat(llm, "3", tools=TOOLS, messages=turns)
    assert "<|assistant|>add([('a', 1)])<|end|><|tool|>3<|end|>" in asked[0]["prompt"]


def test_roles_that_the_template_drops_are_refused(llm):
    """Of the roles that a template may not know, developer is another name of system; what is dropped is refused."""
    template = "{% for m in messages %}{% if m.role in ['system', 'user'] %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
    for known, role, rendered in ((template, "developer", "<|system|>be brief<|user|>a"), (template, "tool", None),
                                  (template.replace("'system'", "'developer'"), "developer", "<|developer|>be brief"),
                                  (template.replace("'system'", "'tool'"), "tool", "<|tool|>be brief")):  # fmt: skip
        text = copy(llm.text)
        text._template_source, text._template = known + "{% endfor %}", None
        scripted = Scripted(llm, "x", text=text)
        with TestClient(api(scripted)[0]) as client:
            messages = [{"role": role, "content": "be brief"}, {"role": "user", "content": "a"}]
            response = client.post(CONVERSE, json={"messages": messages})
        if rendered is None:
            assert response.status_code == 400 and "no role 'tool'" in response.json()["error"]["message"]
            assert not scripted.asked
        else:
            assert response.status_code == 200 and scripted.asked[0][0]["prompt"].startswith(rendered)


def test_earlier_calls_that_are_none_are_refused(llm):
    app, _ = api(llm)
    with TestClient(app) as client:
        for call in (
            {},
            {"function": {"name": "add", "arguments": "[1]"}},
            {"function": {"name": "add", "arguments": "{"}},
        ):
            turns = [*ASK, {"role": "assistant", "tool_calls": [call]}]
            response = client.post("/v1/chat/completions", json={"messages": turns})
            assert response.status_code == 400 and "messages[1].tool_calls[0]" in response.json()["error"]["message"]


def test_special_tokens_are_kept_where_they_mark_calls(llm):
    class Marked:
        """A tokenizer that has [TOOL_CALLS] as a special token."""

        def __getattr__(self, name):
            return getattr(llm.text, name)

        def encode(self, text, **options):
            return [9] if text == "[TOOL_CALLS]" else llm.text.encode(text, **options)

        def decode(self, ids, skip_special_tokens=True):
            return "" if ids == [9] and skip_special_tokens else llm.text.decode(ids, skip_special_tokens)

    for text, asked, kept in ((Marked(), None, False), (llm.text, None, True), (Marked(), True, True)):
        scripted = Scripted(llm, "yes", text=text)
        app, _ = api(scripted)
        with TestClient(app) as client:
            body = {"messages": ASK, "skip_special_tokens": asked}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        assert scripted.asked[0][1].skip_special_tokens is kept
