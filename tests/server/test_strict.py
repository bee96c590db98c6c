"""Strict tools where the model may also answer in words: the grammar of its answer, and what a client is told."""

import json
import random

import numpy as np
import pytest
from api_server import CHAT, CONVERSE, TEMPLATE, Scripted, api, cast
from ingot import AsyncLLM, RequestError
from ingot.runtime.grammar import Grammars, StructuredOutputs
from ingot.runtime.server.formats import Tool
from ingot.runtime.server.strict import can_be_strict, strict_grammar
from ingot.runtime.server.tools import HERMES, Call, ToolReader
from ingot.runtime.text import Text
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer

HERMES_TEMPLATE = (
    "{% if tools %}<|user|>tools: {{ tools | tojson }} as <tool_call>{..}</tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>\n{% endif %}"
    "{% endif %}"
)  # fmt: skip
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9, "description": "a ::= b"},
        "days": {"type": "integer"}}, "required": ["city", "days"], "additionalProperties": False}  # fmt: skip


def tool(name, parameters, strict=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


TOOLS = [tool("weather", CITY, True), tool("add", {"type": "object", "properties": {"a": {"type": "integer"}}})]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return cast(tmp_path_factory.mktemp("engines") / "hermes", HERMES_TEMPLATE)


@pytest.fixture(scope="module")
def llm(engine):
    return AsyncLLM(engine)


def variants(text):
    """The tokenizer with the tags as pieces of text, as tokens that are text, and as tokens for control."""
    yield text
    for special in (False, True):
        tokenizer = Tokenizer.from_str(text.tokenizer.to_str())
        tags = [AddedToken(tag, special=special, normalized=False) for tag in (HERMES, "</tool_call>", "<think>")]
        tokenizer.add_tokens([*tags, AddedToken("<b>", special=False), AddedToken("<|stop|>", special=True)])
        yield Text(tokenizer, {}, HERMES_TEMPLATE)


def matcher_of(text, parallel=True):
    grammar = strict_grammar(text, [Tool.model_validate(each) for each in TOOLS], parallel)
    size = text.tokenizer.get_vocab_size()
    return Grammars(text.tokenizer.to_str(), size, {0}).matcher(StructuredOutputs(grammar=grammar))


def reads(text, answer, parallel=True):
    """Whether all of an answer may be written, and whether it may end there."""
    matcher = matcher_of(text, parallel)
    try:
        for token in text.encode(answer, add_special_tokens=False):
            matcher.advance(token)
    except RequestError:
        return None
    return matcher.complete


def call(name, arguments):
    return f'{HERMES}\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def test_words_are_free_and_calls_are_bound(llm):
    right = call("weather", '{"city": "Bern", "days": 2}')
    for text in variants(llm.text):
        for answer in ("plain", "", '{"name": "weather"', "<tool_cal", "<think>hm <b> x", right,
                       f"First:\n{right}\nDone.", right + "\n" + right, call("add", '{"b": [{"c": 1}]}')):  # fmt: skip
            assert reads(text, answer) is True, answer
        for answer in ("x <tool_call>", right.removesuffix("</tool_call>"), right[:40]):
            assert reads(text, answer) is False, answer
        for answer in (call("none", "{}"), call("weather", '{"city": 1, "days": 2}'), call("add", "3"),
                       call("weather", '{"city": "Bern", "days": 2, "x": 1}'), call("weather", "{}")):  # fmt: skip
            assert reads(text, answer) is None, answer
        assert reads(text, f"a {right} b", parallel=False) is True
    assert reads(text, "a <|stop|>") is None  # of control: nothing that the model says


def test_whatever_is_sampled_after_the_tag_is_a_call(llm):
    draw = random.Random(0)
    for text in variants(llm.text):
        short = [token for each in ('"', "}", "1", ",", " ", "\n", "</") for token in text.encode(each)]
        for _ in range(8):
            matcher = matcher_of(text)
            tokens = text.encode(f"a {HERMES}", add_special_tokens=False)
            for token in tokens:
                matcher.advance(token)
            while not matcher.complete:
                bits = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")
                allowed = np.flatnonzero(bits[1 : text.tokenizer.get_vocab_size()]) + 1
                assert len(allowed) and len(tokens) < 1000
                likely = [token for token in short if bits[token]]
                tokens.append(int(draw.choice(likely if likely and draw.random() < 0.7 else list(allowed))))
                matcher.advance(tokens[-1])
            found = ToolReader(("weather", "add"), openers=(HERMES,)).push(text.decode(tokens, False), final=True)
            (made,) = (part for part in found if isinstance(part, Call))  # the last token may have words, too
            arguments = json.loads(made.arguments)
            if made.name == "weather":
                assert isinstance(arguments.pop("city"), str) and isinstance(arguments.pop("days"), int)
                assert not arguments


def test_a_request_with_strict_tools(llm):
    body = {"messages": CHAT, "tools": TOOLS, "max_tokens": 8}
    with TestClient(api(llm)[0]) as client:
        response = client.post(CONVERSE, json=body)
        assert response.status_code == 200, response.text
        assert client.post(CONVERSE, json=body | {"stream": True}).text.endswith("data: [DONE]\n\n")
        both = client.post(CONVERSE, json=body | {"response_format": {"type": "json_object"}})
        assert both.status_code == 400 and "exclude each other" in both.json()["error"]["message"]
        wrong = client.post(CONVERSE, json=body | {"tools": [tool("f", {"$ref": "http://a/b"}, True)]})
        assert wrong.status_code == 400 and "refused" in wrong.json()["error"]["message"]
    scripted = Scripted(llm, 'Well <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    with TestClient(api(scripted)[0]) as client:
        for more, kind in (({}, "grammar"), ({"tool_choice": "auto"}, "grammar"), ({"tool_choice": "none"}, None),
                           ({"tool_choice": "required"}, "json"), ({"tools": TOOLS[1:]}, None),
                           ({"chat_template_kwargs": {"thinking": True}}, "grammar")):  # fmt: skip
            client.post(CONVERSE, json=body | more)
            wanted = scripted.asked.pop()[1].structured_outputs
            assert (wanted and wanted.source[0]) == kind, more
        message = client.post(CONVERSE, json=body).json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"]["name"] == "add" and message["content"] == "Well"
    # in a form that is not bound nothing is a call
    with TestClient(api(Scripted(llm, '{"name": "weather", "parameters": {}}'))[0]) as client:
        message = client.post(CONVERSE, json=body).json()["choices"][0]["message"]
        assert "tool_calls" not in message and message["content"].startswith("{")


def test_only_templates_that_write_such_calls(llm):
    assert can_be_strict(llm.text)
    for template in (TEMPLATE, None, "{{ raise_exception('no') }}", HERMES_TEMPLATE.replace("<tool_call>", "[CALL]")):
        assert not can_be_strict(Text(llm.text.tokenizer, {}, template))
