"""How bodies are read: values as they are (`strict`: "5" is no number), and one sentence that names what is wrong.

Fields that are known and not supported are refused with the reason, unknown ones with the nearest name. Invariant:
null is the same as leaving a field out, and so is a value that asks for nothing (`_NEUTRAL`): clients send defaults.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import ApiError

MAX_STOP_STRINGS = 64  # every token's text is compared with each
MAX_STOP_LENGTH = 1024  # characters
SHOWN = 60  # characters of a wrong value that are repeated to the client

_GUIDED = "is vLLM's former name; use structured_outputs"
REFUSED: dict[str, str] = {
    "suffix": "is not supported: the model completes at the end only; leave it out",
    "best_of": "is not supported; use n",
    "use_beam_search": "is not supported; use n with temperature",
    "length_penalty": "is not supported: it belongs to beam search; leave it out",
    "spaces_between_special_tokens": "can only be true: the tokenizer puts the spaces; leave it out",
    "cache_salt": "is not supported; leave it out",
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

# of those, the values that ask for nothing
_NEUTRAL: dict[str, Any] = {
    "suffix": "", "use_beam_search": False, "length_penalty": 1, "spaces_between_special_tokens": True,
    "logits_processors": [], "bad_words": [], "continue_final_message": False,
}  # fmt: skip

# fields of several forms, where pydantic has a sentence for each of them, and of patterns, where it shows the pattern
_FORMS = {
    "prompt": "it must be a string, a list of strings, a list of token ids or a list of such lists",
    "stop": f"it must be a string of 1 to {MAX_STOP_LENGTH} characters or a list of at most {MAX_STOP_STRINGS} such",
    "request_id": "it must have 1 to 128 characters out of A-Z a-z 0-9 . _ : / + = -",
    "tool_choice": "it must be 'none', 'auto', 'required' or an object that names a function",
}

Body = TypeVar("Body", bound="Fields")


class Fields(BaseModel):
    """A JSON object of known fields."""

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
                if not _asks_nothing(name, data):
                    raise ApiError(400, f"{name} {REFUSED[name]}.", name, "unsupported_parameter")
            else:
                near = difflib.get_close_matches(name[:SHOWN], known, n=1)
                hint = f"did you mean {near[0]}?" if near else "leave it out."
                shown = name[:SHOWN] if name.isprintable() and name.strip() else repr(name)[:SHOWN]
                raise ApiError(400, f"{shown} is not a field of this request; {hint}", shown, "unknown_parameter")
        return {name: value for name, value in data.items() if name not in unknown}


def _asks_nothing(name: str, data: dict[str, Any]) -> bool:
    """Whether a field that is refused has a value that changes nothing."""
    value = data[name]
    neutral = _NEUTRAL.get(name) if name != "best_of" else 1 if data.get("n") is None else data["n"]
    return value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


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
    value, said = first["input"], first["msg"].replace("Input should", "it should", 1)
    match value:
        case None:
            shown = "null"
        case dict():
            shown = "an object"
        case list() | tuple():
            shown = "a list"
        case float() if not math.isfinite(value):
            shown = "NaN, which is not a number" if math.isnan(value) else repr(value)
            said = said.replace("should be", "should be a finite number", 1)
        case _:
            shown = repr(value)[:SHOWN]
    if field in _FORMS:
        verb = "is" if len(first["loc"]) <= 2 else "holds"
        return ApiError(400, f"{path} {verb} {shown}; {_FORMS[field]}.", path)
    return ApiError(400, f"{path} is {shown}; {said}.", path)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].role`; pydantic's names of union members are left out."""
    path = str(location[0])
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}"
    return path
