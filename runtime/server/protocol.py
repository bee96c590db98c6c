"""What clients may send: the bodies of the API, OpenAI's fields and vLLM's, checked before anything else happens.

Ranges are left to `SamplingParams`, which has the sentences. Invariant: a field is honoured, or refused by name; only
those in `_Bookkeeping` are accepted and have no effect, as they describe the caller and not the answer.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, StringConstraints, model_validator

from ..request import SamplingParams
from .body import MAX_STOP_LENGTH, MAX_STOP_STRINGS, SHOWN, Fields
from .errors import ApiError
from .formats import ResponseFormat, Tool, calls_schema
from .security import REQUEST_ID

MAX_TOOLS = 128  # OpenAI's limit

Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(Fields):
    """What a stream holds besides the text. `continuous_usage_stats`: usage in every chunk (vLLM's)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against eavesdroppers is not made


class _Bookkeeping(Fields):
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class _Generation(_Bookkeeping):
    """What both kinds of completion share. None everywhere: as the model's generation_config says, or the default.

    `request_id` names the answer, instead of the request's X-Request-Id. `return_tokens_as_token_ids`:
    log-probabilities have `token_id:5` for a token's text, which two tokens may share (vLLM's).
    """

    model: str | None = None
    n: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # float32 has no room for the square of 1e30
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, SkipValidation[float]] | None = None  # `SamplingParams` names the key at fault
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, StringConstraints(pattern=f"^{REQUEST_ID}$")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """A last chunk has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_chunks(self) -> bool:
        """So has every other."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that the client has set, except those of log-probabilities."""
        names = {field.name for field in fields(SamplingParams)} - {"logprobs"}
        options = {
            name: value
            for name in type(self).model_fields
            if name in names and (value := getattr(self, name)) is not None
        }
        if self.response_format and (wanted := self.response_format.structured_outputs):
            options["structured_outputs"] = wanted
        return options

    def check_generation(self) -> None:
        """Raises ApiError for fields that do not go together."""
        if self.structured_outputs is not None and self.response_format and self.response_format.type != "text":
            sentence = "response_format and structured_outputs both say what the answer is; send one of them."
            raise ApiError(400, sentence, "structured_outputs")
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options is set without stream; set stream to true.", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs does not go with stream; leave one out.", "prompt_logprobs")


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        self.check_generation()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens is 0; it must be at least 1, or 0 with echo.", "max_tokens")
        return self


class Message(BaseModel):
    """One turn. Other keys (reasoning_content, for one) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class _Templated(Fields):
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(_Generation, _Templated):
    """POST /v1/chat/completions. `max_completion_tokens` is OpenAI's newer name of `max_tokens`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        self.check_generation()
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            sentence = f"max_tokens is {old} and max_completion_tokens {new}; send one of them."
            raise ApiError(400, sentence, "max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is set without logprobs; set logprobs to true.", "top_logprobs")
        if self.tool_choice in ("auto", "required") and not self.tools:
            raise ApiError(400, f"tool_choice is {self.tool_choice!r}, but there are no tools.", "tool_choice")
        if self.forced_tools and "structured_outputs" in super().sampling():
            sentence = f"tool_choice {self.tool_choice!r} and a format of the answer exclude each other; send one."
            raise ApiError(400, sentence, "tool_choice")
        if self.strict_tool is not None and "structured_outputs" in super().sampling():
            sentence = f"{self.strict_tool} and a format of the answer exclude each other; send one."
            raise ApiError(400, sentence, self.strict_tool)
        return self

    @property
    def strict_tool(self) -> str | None:
        """The first strict tool of which a call is bound to its schema while other words are free; None without one."""
        if self.forced_tools or self.tool_choice == "none":
            return None
        strict = (i for i, tool in enumerate(self.tools or ()) if tool.function.strict)
        return next((f"tools[{i}].function.strict" for i in strict), None)

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which the answer must call one: all with tool_choice "required", or the one it names.

        Raises ApiError where it names none of them.
        """
        if self.tool_choice == "required":
            return list(self.tools or ())
        if not isinstance(self.tool_choice, dict):
            return []
        function = self.tool_choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        found = [tool for tool in self.tools or () if tool.function.name == name]
        if self.tool_choice.get("type") != "function" or not found:
            raise ApiError(400, f"tool_choice is {str(self.tool_choice)[:SHOWN]}; it must name one of the tools.",
                           "tool_choice")  # fmt: skip
        return found

    def sampling(self) -> dict[str, Any]:
        options = super().sampling()
        if self.forced_tools:
            one = isinstance(self.tool_choice, dict) or self.parallel_tool_calls is False
            options["structured_outputs"] = {"json": json.dumps(calls_schema(self.forced_tools, one))}
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        return options


class TokenizeRequest(_Templated):
    """POST /tokenize: of a `prompt`, or of a conversation as its chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _together(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "The request needs a prompt or messages, and not both.", "prompt")
        return self


class DetokenizeRequest(Fields):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
