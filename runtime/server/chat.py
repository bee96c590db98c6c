"""POST /v1/chat/completions: a conversation through the model's chat template, its answer taken apart.

What the template cannot express (roles, tools, reasoning_effort) is found out by rendering, and refused. An answer goes
through the readers of reasoning and of tool calls, streamed or not, so both say the same.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from msgspec import UNSET, UnsetType

from ...engines.errors import RequestError
from ..request import CompletionOutput, Logprob, SamplingParams
from ..text import Text
from . import answers, sse
from .answers import (
    Answer,
    AnswerMessage,
    Called,
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    ChunkChoice,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)  # fmt: skip
from .errors import ApiError
from .formats import Tool
from .generation import Collected, Counted, Encoded, Generator, Job, off_loop, reason_of
from .protocol import ChatRequest, Message
from .reasoning import CLOSE, OPEN, Piece, ReasoningReader
from .strict import can_be_strict, strict_grammar
from .tools import HERMES, MARKERS, OPENERS, Call, CallList, ToolReader

_ROLES = frozenset(("system", "user", "assistant"))  # every template knows them, or refuses them itself
_TAKEN = frozenset(("tools", "tool_choice"))  # fields of the request


async def prepare(generator: Generator, body: ChatRequest, request_id: str, arrival: float) -> Job:
    """The job of a request. Raises ApiError and RequestError."""
    generator.check_model(body.model)
    text = generator.llm.text
    options: dict[str, Any] = body.sampling()
    more: dict[str, Any] = {}
    told = "max_tokens" in options or generator.llm.default_params().max_tokens != SamplingParams.max_tokens
    if not told:  # neither by the client nor by generation_config
        more["max_tokens"] = None  # an answer ends by itself, or with the context
    if body.logprobs:
        more["logprobs"] = body.top_logprobs or 0
    if text and body.skip_special_tokens is None and _markers_vanish(text):
        more["skip_special_tokens"] = False
    if body.strict_tool is not None:
        options["structured_outputs"] = {"grammar": _strict(text, body, body.strict_tool)}
    params = generator.params(options, **more)
    values: dict[str, Any] = {}
    if tools := offered(body):
        values["tool_choice"] = "auto"
    if body.reasoning_effort is not None:
        values["reasoning_effort"] = body.reasoning_effort
    prompt = await encode(text, body.messages, tools, body, values, body.add_special_tokens is True)
    generator.check_prompt(prompt.ids)
    if params.structured_outputs and body.strict_tool is None and _reasons(body, prompt.text):
        sentence = (
            "The chat template has the model reason first, so the format of the answer cannot be kept; turn reasoning"
        )
        raise ApiError(400, f"{sentence} off in chat_template_kwargs, or leave the format out.", "chat_template_kwargs")
    return Job(f"chatcmpl-{body.request_id or request_id}", [prompt], params, body.priority or 0, arrival)


async def encode(
    text: Text | None, messages: Sequence[Message], tools: Sequence[Tool], body: Any, values: Mapping[str, Any],
    add_special_tokens: bool = False,
) -> Encoded:  # fmt: skip
    """The prompt of a conversation. body: with add_generation_prompt and chat_template_kwargs. Raises RequestError."""
    if text is None:
        raise RequestError("This engine has no tokenizer, so it has no chat; send token ids to /v1/completions.")
    extra = body.chat_template_kwargs or {}
    if taken := sorted((_TAKEN | text.own_values) & extra.keys()):
        raise ApiError(
            400, f"chat_template_kwargs sets {taken[0]}, which is not for it to set.", "chat_template_kwargs"
        )
    turns = [_turn(i, message) for i, message in enumerate(messages)]
    for turn in turns:
        if turn["role"] == "developer" and not text.template_has("developer"):
            turn["role"] = "system"  # what OpenAI's API calls it now
    num_characters = sum(len(turn["content"]) for turn in turns) + 512 * len(tools)
    add_generation_prompt = body.add_generation_prompt is not False

    def render(**changes: Any) -> str:
        given = {"messages": turns, **extra, **values, **changes}
        return text.render(add_generation_prompt=add_generation_prompt, **given)

    def work() -> Encoded:
        given = [tool.model_dump(exclude_unset=True) for tool in tools]
        rendered = render(tools=given) if given else render()
        _check_honoured(render, rendered, turns, given, values)
        return Encoded(rendered, text.encode(rendered, add_special_tokens=add_special_tokens))

    return await off_loop(num_characters, work)


def _strict(text: Text | None, body: ChatRequest, field: str) -> str:
    """The grammar of an answer that may call strict tools. Raises ApiError: the model has no format for it."""
    if text is None or not can_be_strict(text):
        raise ApiError(400, f"{field} needs tool_choice 'required' or a named function: the way in which this model "
                       "writes calls cannot be bound to a schema.", field, "unsupported_parameter")  # fmt: skip
    return strict_grammar(text, offered(body), body.parallel_tool_calls is not False)


def offered(body: ChatRequest) -> list[Tool]:
    """The tools that the model hears of: with tool_choice "none", it hears of none."""
    return list(body.tools or ()) if body.tool_choice != "none" else []


async def answer(generator: Generator, body: ChatRequest, job: Job, created: int) -> Answer[ChatChoice]:
    """All of it, when it is complete."""
    counted, scores = Counted(job), None
    collected = [Collected() for _ in range(job.params.n)]
    async with aclosing(generator.run(job)) as outputs:
        async for p, output in outputs:
            counted.add(p, output)
            scores = output.prompt_logprobs
            for one in output.outputs:
                collected[one.index].add(one)
    choices = [_whole(i, whole, _Reader(body, job), body) for i, whole in enumerate(collected)]
    found = Answer(job.id, "chat.completion", created, generator.model, choices, counted.usage())
    if body.prompt_logprobs is not None and scores:
        found.prompt_logprobs = answers.prompt_logprobs(scores)
    if body.return_token_ids:
        found.prompt_token_ids = job.prompts[0].ids
    return found


async def events(generator: Generator, body: ChatRequest, job: Job, created: int) -> AsyncGenerator[bytes, None]:
    """The same as encoded events, as it comes."""
    counted = Counted(job)
    choices = [_Streamed(i, _Reader(body, job), body) for i in range(job.params.n)]

    def chunk(parts: list[ChunkChoice], usage: Usage | UnsetType | None) -> bytes:
        return sse.event(Answer(job.id, "chat.completion.chunk", created, generator.model, parts, usage))

    data = b""
    async with aclosing(generator.run(job)) as outputs:
        async for p, output in outputs:
            counted.add(p, output)
            usage = counted.usage() if body.usage_in_chunks else None if body.include_usage else UNSET
            data = b"".join(chunk([part], usage) for one in output.outputs for part in choices[one.index].parts(one))
            if data and not counted.complete:
                yield data
    if body.include_usage:
        data += chunk([], counted.usage())
    yield data + sse.DONE


class _Reader:
    """Takes one answer apart: reasoning, content, calls."""

    def __init__(self, body: ChatRequest, job: Job):
        self._reasoning = ReasoningReader(_reasons(body, job.prompts[0].text))
        tools = offered(body)
        parallel = body.parallel_tool_calls is not False
        self._tools: ToolReader | CallList | None = None
        if body.forced_tools:
            self._tools = CallList()
        elif tools:
            openers = OPENERS if body.strict_tool is None else (HERMES,)  # others are not bound
            self._tools = ToolReader((tool.function.name for tool in tools), parallel, openers)

    def push(self, text: str, final: bool) -> list[Piece | Call]:
        found: list[Piece | Call] = []
        pieces = self._reasoning.push(text, final)
        for piece in pieces:
            if self._tools is None or piece.kind == "reasoning":
                found.append(piece)
            else:
                found += map(_content, self._tools.push(piece.text))
        if final and self._tools:
            found += map(_content, self._tools.push("", final=True))
        return found

    def reason(self, reason: answers.Reason | None) -> answers.Reason | None:
        """Why the answer ended, for the client."""
        return "tool_calls" if reason == "stop" and self._tools and self._tools.num_calls else reason


def _reasons(body: ChatRequest, prompt: str | None) -> bool:
    """Whether the answer begins in the middle of reasoning: some templates write the opening tag themselves."""
    return body.add_generation_prompt is not False and (prompt or "").rstrip().endswith(OPEN)


class _Streamed:
    """A choice as chunks: the role first, then what there is of it, last the reason."""

    def __init__(self, index: int, reader: _Reader, body: ChatRequest):
        self._index, self._reader, self._body = index, reader, body
        self._begun = self._ended = False
        self._num_calls = 0

    def parts(self, one: CompletionOutput) -> list[ChunkChoice]:
        """The chunks that a delta of the engine makes."""
        if self._ended or not (one.token_ids or one.finish_reason):
            return []
        deltas, reason = [], reason_of(one)
        if not self._begun:
            self._begun = True
            deltas.append(ChatDelta(role="assistant", content=""))
        told = len(deltas)
        for found in self._reader.push(one.text, reason is not None):
            deltas.append(self._delta(found))
        if len(deltas) == told and one.token_ids and (one.logprobs or self._body.return_token_ids):
            deltas.append(ChatDelta())  # nothing to say yet, but something about its tokens
        parts = [ChunkChoice(self._index, delta) for delta in deltas]
        if len(deltas) > told:
            parts[told].logprobs = _logprobs(one.token_ids, one.logprobs, self._body)
            if self._body.return_token_ids:
                parts[told].token_ids = one.token_ids
        if reason:
            self._ended = True
            last = ChunkChoice(self._index, ChatDelta(), finish_reason=self._reader.reason(reason))
            last.stop_reason = one.stop_reason
            parts.append(last)
        return parts

    def _delta(self, found: Piece | Call) -> ChatDelta:
        if isinstance(found, Call):
            call = ToolCall(found.id, Called(found.name, found.arguments), index=self._num_calls)
            self._num_calls += 1
            return ChatDelta(tool_calls=[call])
        return ChatDelta(content=found.text) if found.kind == "content" else ChatDelta(reasoning_content=found.text)


def _content(found: str | Call) -> Piece | Call:
    return Piece("content", found) if isinstance(found, str) else found


def _whole(index: int, whole: Collected, reader: _Reader, body: ChatRequest) -> ChatChoice:
    pieces = reader.push(whole.text, final=True)
    calls = [ToolCall(p.id, Called(p.name, p.arguments)) for p in pieces if isinstance(p, Call)]
    content = "".join(p.text for p in pieces if isinstance(p, Piece) and p.kind == "content")
    reasoning = "".join(p.text for p in pieces if isinstance(p, Piece) and p.kind == "reasoning")
    message = AnswerMessage(content or (None if calls else ""))
    if calls:
        message.tool_calls = calls
    if reasoning:
        message.reasoning_content = reasoning
    logprobs = _logprobs(whole.token_ids, whole.logprobs, body) if body.logprobs else None
    choice = ChatChoice(index, message, logprobs, reader.reason(whole.finish_reason), whole.stop_reason)
    if body.return_token_ids:
        choice.token_ids = whole.token_ids
    return choice


def _logprobs(
    tokens: Sequence[int], entries: Sequence[dict[int, Logprob]] | None, body: ChatRequest
) -> ChatLogprobs | None:
    """OpenAI's form: the chosen token, and the likeliest ones. None where none are wanted."""
    if entries is None:
        return None
    content, as_ids = [], body.return_tokens_as_token_ids
    for token, entry in zip(tokens, entries, strict=True):
        chosen = entry[token]
        ordered = sorted(entry.items(), key=lambda item: -item[1].logprob)
        top = [TopLogprob(*_spelt(t, found, as_ids)) for t, found in ordered]
        content.append(TokenLogprob(*_spelt(token, chosen, as_ids), top))
    return ChatLogprobs(content)


def _spelt(token: int, found: Logprob, as_id: bool | None) -> tuple[str, float, list[int] | None]:
    text, shown = answers.spelling(token, found), answers.spelling(token, found, as_id)
    # part of a character has no text, and its bytes are not known here
    return shown, answers.score(found), None if "\ufffd" in text else list(text.encode())


def _turn(index: int, message: Message) -> dict[str, Any]:
    """A message as templates expect it: no nulls, text content, arguments of calls as objects."""
    turn = {name: value for name, value in message.model_dump(exclude_unset=True).items() if value is not None}
    turn.setdefault("content", "")
    if isinstance(turn["content"], list):
        parts = turn["content"]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise ApiError(400, f"messages[{index}].content has a part that is no text; this engine reads text only.",
                           f"messages[{index}].content")  # fmt: skip
        turn["content"] = "".join(part["text"] for part in parts)
    if "tool_calls" in turn:
        turn["tool_calls"] = [
            _past_call(f"messages[{index}].tool_calls[{i}]", c) for i, c in enumerate(turn["tool_calls"])
        ]
    return turn


def _past_call(where: str, call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}.function must be an object with name and arguments.", f"{where}.function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{where}.function.arguments must be a JSON object.", f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _check_honoured(
    render: Callable[..., str], rendered: str, turns: Sequence[dict[str, Any]], tools: Sequence[Any],
    values: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raises ApiError where the template pays no attention to a role, tools or reasoning_effort: silently dropped."""
    if roles := {turn["role"] for turn in turns} - _ROLES:
        mark = secrets.token_hex(8)
        marked = [{**turn, "content": f"{turn['content']}{mark}{i}."} for i, turn in enumerate(turns)]
        text = render(messages=marked, **({"tools": tools} if tools else {}))
        roles -= {turns[int(i)]["role"] for i in re.findall(rf"{mark}(\d+)\.", text)}
        if roles:
            sentence = f"The chat template of this model has no role {min(roles)[:60]!r}; use another."
            raise ApiError(400, sentence, "messages")
    if tools and rendered == render():
        raise ApiError(400, "The chat template of this model has no place for tools; leave them out.", "tools")
    if "reasoning_effort" in values and render(reasoning_effort="low") == render(reasoning_effort="high"):
        sentence = "The chat template of this model has no reasoning_effort; leave it out."
        raise ApiError(400, sentence, "reasoning_effort")


@lru_cache(maxsize=4)  # by identity: a tokenizer does not change
def _markers_vanish(text: Text) -> bool:
    """Whether the tokenizer has a tag of tool calls or reasoning as a special token, which decoding would skip."""
    for marker in (*MARKERS, OPEN, CLOSE):
        ids = text.encode(marker, add_special_tokens=False)
        if len(ids) == 1 and not text.decode(ids, skip_special_tokens=True):
            return True
    return False
