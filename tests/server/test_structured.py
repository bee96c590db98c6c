"""Structured outputs and forced tool calls through the official client, whole and streamed."""

import asyncio
import json
import re
from typing import Annotated, Literal

import openai
import pytest
from api_server import CHAT, NAME, TEMPLATE, api, cast, serving
from ingot import AsyncLLM
from pydantic import BaseModel, Field

pytest.importorskip("llguidance")


class Weather(BaseModel):
    """The weather of a place."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


class Answer(BaseModel):
    good: bool
    score: Literal[1, 2, 3]
    tags: Annotated[list[Literal["a", "b"]], Field(max_length=2)]


TOOLS = [
    openai.pydantic_function_tool(Weather),
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    llm = AsyncLLM(cast(tmp_path_factory.mktemp("engines") / "draft", TEMPLATE))
    app, _ = api(llm)
    with serving(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
        yield client
    asyncio.run(llm.close())


def test_an_answer_parsed_by_the_client_s_own_helper(client):
    for seed in range(4):
        found = client.chat.completions.parse(
            model=NAME, messages=CHAT, response_format=Answer, seed=seed, temperature=1.2, max_tokens=300
        )
        assert found.choices[0].finish_reason == "stop"
        assert isinstance(found.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(
        model=NAME, messages=CHAT, response_format=Answer, seed=0, temperature=0, max_tokens=300
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_json_object_regex_choice_and_grammar(client):
    found = client.chat.completions.create(
        model=NAME, messages=CHAT, response_format={"type": "json_object"}, temperature=0, max_tokens=60
    )
    assert found.choices[0].message.content.startswith("{")
    for wanted, right in (
        ({"regex": "[0-9]{4}-[0-9]{2}"}, lambda text: re.fullmatch("[0-9]{4}-[0-9]{2}", text)),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'root ::= "<" [a-c] ">"'}, lambda text: re.fullmatch("<[a-c]>", text)),
        ({"json": Answer.model_json_schema()}, lambda text: Answer.model_validate_json(text)),
    ):
        found = client.completions.create(
            model=NAME, prompt="x = ", n=3, temperature=1.0, seed=1, max_tokens=100,
            extra_body={"structured_outputs": wanted},
        )  # fmt: skip
        for choice in found.choices:
            assert choice.finish_reason == "length" or right(choice.text), (wanted, choice.text)
        assert any(choice.finish_reason == "stop" for choice in found.choices)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
def test_calls_that_must_be_made(client, choice):
    for seed in range(3):
        found = client.chat.completions.create(
            model=NAME, messages=CHAT, tools=TOOLS, tool_choice=choice, seed=seed, temperature=1.0, max_tokens=150,
            parallel_tool_calls=False,
        ).choices[0]  # fmt: skip
        if found.finish_reason == "length":
            continue
        (call,) = found.message.tool_calls
        assert found.finish_reason == "tool_calls" and found.message.content is None
        assert call.function.name in ("Weather", "stop") and (choice == "required" or call.function.name == "Weather")
        if call.function.name == "Weather":
            Weather.model_validate_json(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}


def test_a_forced_call_is_streamed_as_the_whole_says(client):
    options = dict(
        model=NAME, messages=CHAT, tools=TOOLS, temperature=0, max_tokens=150,
        tool_choice={"type": "function", "function": {"name": "stop"}},
    )  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.message.tool_calls[0].function.name == "stop"
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True) if chunk.choices]
    calls = [call for part in parts for call in part.delta.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls] == [("stop", "{}")]
    assert parts[-1].finish_reason == "tool_calls" and not any(part.delta.content for part in parts)


def test_reasoning_that_the_template_begins_does_not_go_with_a_format(client):
    with pytest.raises(openai.BadRequestError, match="reason first"):
        client.chat.completions.create(
            model=NAME, messages=CHAT, response_format={"type": "json_object"},
            extra_body={"chat_template_kwargs": {"thinking": True}},
        )  # fmt: skip
