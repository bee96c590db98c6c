"""What clients may send: the bodies of the API, OpenAI's fields and vLLM's, checked before anything else happens.

Values are taken as they are (`strict`: "5" is no number), ranges are left to `SamplingParams`, which has the sentences.
Invariant: a field is honoured, or refused by name; only those in `_Bookkeeping` are accepted and have no effect, as
they describe the caller and not the answer.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ..request import SamplingParams
from .errors import ApiError

MAX_STOP_STRINGS = 64  # every token's text is compared with each
MAX_STOP_LENGTH = 1024  # characters
MAX_TOOLS = 128  # OpenAI's limit
_SHOWN = 60  # characters of a wrong value that are repeated to the client

_STRICT = "needs tool_choice 'required' or a named function: other answers are not bound to a schema"
_GUIDED = "is vLLM's former name; use structured_outputs"
REFUSED: dict[str, str] = {
    "suffix": "is not supported: the model completes at the end only; leave it out",
    "best_of": "is not supported; use n",
    "use_beam_search": "is not supported; use n with temperature",
    "logits_processors": "is not supported: no code of a client is run",
    "chat_template": "is not accepted from clients: the engine's own template is used",
    "truncate_prompt_tokens": "is not supported; send a shorter prompt",
    "bad_words": "is not supported; use logit_bias",
    "allowed_token_ids": "is not supported; use logit_bias",
    "functions": "is OpenAI's former name of tools; use tools",
    "function_call": "is OpenAI's former name of tool_choice; use tool_choice",
    "audio": "is not supported: the model writes text",
    "prediction": "is not supported; leave it out",
    "verbosity": "is not supported; leave it out",
    "web_search_options": "is not supported; leave it out",
    "continue_final_message": "is not supported; use /v1/completions to continue a text",
    "documents": "is not supported; put them into a message, or into chat_template_kwargs",
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
         "guided_whitespace_pattern"), _GUIDED,
    ),
}  # fmt: skip

# fields of several forms, where pydantic has a sentence for each of them
_FORMS = {
    "prompt": "it must be a string, a list of strings, a list of token ids or a list of such lists",
    "stop": f"it must be a string of 1 to {MAX_STOP_LENGTH} characters or a list of at most {MAX_STOP_STRINGS} such",
    "tool_choice": "it must be 'none', 'auto', 'required' or an object that names a function",
}

Body = TypeVar("Body", bound="_Body")
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        """Fields that are refused by name, and unknown ones; null is the same as leaving a field out."""
        if not isinstance(data, dict):
            return data
        known = [field.alias or name for name, field in cls.model_fields.items()]
        unknown = [name for name in data if name not in known]
        for name in unknown:
            if name in REFUSED:
                if data[name] is not None:
                    raise ApiError(400, f"{name} {REFUSED[name]}.", name, "unsupported_parameter")
            else:
                near = difflib.get_close_matches(name[:_SHOWN], known, n=1)
                hint = f"did you mean {near[0]}?" if near else "leave it out."
                raise ApiError(400, f"{name[:_SHOWN]} is not a field of this request; {hint}", name[:_SHOWN],
                               "unknown_parameter")  # fmt: skip
        return {name: value for name, value in data.items() if name not in unknown}


class StreamOptions(_Body):
    """What a stream holds besides the text. `continuous_usage_stats`: usage in every chunk (vLLM's)."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against eavesdroppers is not made


class JsonSchema(_Body):
    """A schema and its name. What the schema says is always kept, `strict` or not."""

    model_config = ConfigDict(protected_namespaces=())

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """What the answer is: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            sentence = (
                f"response_format is of type {self.type}; json_schema belongs to the type json_schema, and only to it."
            )
            raise ApiError(400, sentence, "response_format")
        return self

    @property
    def structured_outputs(self) -> dict[str, Any] | None:
        """As `SamplingParams` takes it; None: any text."""
        if self.json_schema is None:
            return {"json_object": True} if self.type == "json_object" else None
        schema = self.json_schema.schema_
        return {"json": json.dumps({} if schema is None else schema)}


class _Bookkeeping(_Body):
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class _Generation(_Bookkeeping):
    """What both kinds of completion share. None everywhere: as the model's generation_config says, or the default."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)  # float32 has no room for the square of 1e30
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenKey, float] | None = None
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


class Function(_Body):
    """What a tool is called, and the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: Function


class _Templated(_Body):
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
        for i, tool in enumerate(self.tools or ()):
            if tool.function.strict and not self.forced_tools and self.tool_choice != "none":
                name = f"tools[{i}].function.strict"
                raise ApiError(400, f"{name} {_STRICT}.", name, "unsupported_parameter")
        return self

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
            raise ApiError(400, f"tool_choice is {str(self.tool_choice)[:_SHOWN]}; it must name one of the tools.",
                           "tool_choice")  # fmt: skip
        return found

    def sampling(self) -> dict[str, Any]:
        options = super().sampling()
        if self.forced_tools:
            options["structured_outputs"] = {"json": json.dumps(self._calls())}
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        return options

    def _calls(self) -> dict[str, Any]:
        """The schema of an answer that is nothing but calls: a list of names and arguments."""
        calls = [
            {"type": "object", "additionalProperties": False, "required": ["name", "arguments"], "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object", "additionalProperties": False},
            }}
            for tool in self.forced_tools
        ]  # fmt: skip
        one = isinstance(self.tool_choice, dict) or self.parallel_tool_calls is False
        return {"type": "array", "minItems": 1, "items": {"anyOf": calls}} | ({"maxItems": 1} if one else {})


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


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in a JSON body. Raises ApiError with one sentence that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _sentence(error) from None


def _sentence(error: ValidationError) -> ApiError:
    """Of all that is wrong, the first."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    if not first["loc"]:
        return ApiError(400, "The body must be a JSON object.", code="invalid_json")
    field = str(first["loc"][0])
    path = field if field in _FORMS else _path(first["loc"])
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing; the request needs it.", path)
    value = first["input"]
    match value:
        case None:
            shown = "null"
        case dict():
            shown = "an object"
        case list() | tuple():
            shown = "a list"
        case _:
            shown = repr(value)[:_SHOWN]
    if field in _FORMS:
        verb = "is" if len(first["loc"]) <= 2 else "holds"
        return ApiError(400, f"{path} {verb} {shown}; {_FORMS[field]}.", path)
    return ApiError(400, f"{path} is {shown}; {first['msg'].replace('Input should', 'it should', 1)}.", path)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].role`; pydantic's names of union members are left out."""
    path = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}"
    return path
