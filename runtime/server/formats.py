"""What an answer may be bound to: response formats, tools, and the schema of an answer that must call them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from .body import Fields
from .errors import ApiError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class JsonSchema(Fields):
    """A schema and its name. What the schema says is always kept, `strict` or not."""

    model_config = ConfigDict(protected_namespaces=())

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
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


class Function(Fields):
    """What a tool is called, and the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: Function


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of a call of one of the tools."""
    return {"anyOf": [
        {"type": "object", "additionalProperties": False, "required": ["name", "arguments"], "properties": {
            "name": {"const": tool.function.name},
            "arguments": tool.function.parameters or {"type": "object", "additionalProperties": False},
        }}
        for tool in tools
    ]}  # fmt: skip


def calls_schema(tools: Sequence[Tool], one: bool) -> dict[str, Any]:
    """The schema of an answer that is nothing but calls: a list of names and arguments. one: of a single call."""
    return {"type": "array", "minItems": 1, "items": call_schema(tools)} | ({"maxItems": 1} if one else {})
