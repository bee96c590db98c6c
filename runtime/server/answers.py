"""What clients get: OpenAI's answers and chunks, with vLLM's extra fields.

They are msgspec structs, not pydantic models: a chunk is made and encoded for every token of every stream, in 1.2 us
where pydantic takes 13 (a loop over one chunk; Python 3.11 on one core of a shared x86 machine). A field that is UNSET
is left out; one that is None is there as null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from ..request import Logprob

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have; vLLM's and OpenAI's number
Reason = Literal["stop", "length", "tool_calls"]
Choice = TypeVar("Choice")


class CachedTokens(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens. A prompt counts once, whatever n is; `cached_tokens` were found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class TextLogprobs(msgspec.Struct):
    """Parallel lists, an entry per token; `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class Called(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """`index` is there in chunks only."""

    id: str
    function: Called
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class AnswerMessage(msgspec.Struct):
    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET


class Answer(msgspec.Struct, Generic[Choice]):
    """A whole answer, or a chunk of one; `usage` is null in the chunks of a stream that ends with it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "ingot"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """Answer of /detokenize."""

    prompt: str


def score(found: Logprob) -> float:
    """A log-probability that JSON can hold."""
    return max(found.logprob, LOWEST)


def spelling(token: int, found: Logprob | None, as_id: bool | None = False) -> str:
    """The token's text; without one, or where wanted, its number as vLLM writes it."""
    spelt = None if as_id or found is None else found.decoded_token
    return f"token_id:{token}" if spelt is None else spelt


def prompt_logprobs(entries: Sequence[dict[int, Logprob] | None]) -> PromptLogprobs:
    """vLLM's extra field: for each prompt token the candidates by id."""
    return [
        None if entry is None
        else {token: PromptLogprob(score(found), found.rank, found.decoded_token) for token, found in entry.items()}
        for entry in entries
    ]  # fmt: skip
