"""Strict tools of a model that may also answer in words: its text is free, a call is bound once its tag is there.

Only the format that Hermes and Qwen write has such a tag before a call that is JSON; whether a model was taught it is
seen in how its chat template writes a call that was made. Invariant: in an answer bound so, every call that the reader
of tool calls finds has the arguments that its tool asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from ...engines.errors import RequestError
from ..grammar import BLANKS
from ..text import Text
from .formats import Tool, call_schema
from .reasoning import CLOSE, OPEN
from .tools import HERMES, HERMES_END

_PROBE: dict[str, Any] = {"name": "probe", "arguments": {"key": "value"}}
_WRITTEN = re.compile(
    rf'{HERMES}\s*\{{"name": ?"probe", ?"arguments": ?\{{"key": ?"value"\}}\}}\s*{HERMES_END}'
)  # fmt: skip


@lru_cache(maxsize=4)  # by identity: a template does not change
def can_be_strict(text: Text) -> bool:
    """Whether the chat template writes calls as JSON between Hermes' tags."""
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _PROBE}]},
    ]
    try:
        return bool(_WRITTEN.search(text.render(turns, add_generation_prompt=False)))
    except RequestError:
        return False


def strict_grammar(text: Text, tools: Sequence[Tool], parallel: bool) -> str:
    """A grammar (Lark, as llguidance extends it) of words and calls of these tools. parallel: any number of calls."""
    added = text.tokenizer.get_added_tokens_decoder()
    begins, ends = (text.tokenizer.token_to_id(tag) for tag in (HERMES, HERMES_END))
    # a token that was added to the vocabulary is no text for llguidance; of them, those for control stay out of words
    words = [
        token
        for token, each in added.items()
        if (not each.special or each.content in (OPEN, CLOSE)) and token not in (begins, ends)
    ]
    word, others = ("word | ", "word*") if words else ("", "")
    bound = [tool if tool.function.strict else _any_arguments(tool) for tool in tools]
    schema = call_schema(bound) | {"x-guidance": {"whitespace_pattern": BLANKS}}
    # a grammar with ::= would be taken for GBNF
    written = json.dumps(schema).replace("::=", "\\u003a:=")
    return f"""%llguidance {{}}
start: {f"({word}call)*" if parallel else f"{others} (call {others})?"} TEXT
call: (spelt{_or("TEXT <[%d]>", begins)}) BLANKS json BLANKS ("{HERMES_END}"{_or("<[%d]>", ends)})
spelt[lazy]: TEXT "{HERMES}"
json: %json {written}
{f"word: TEXT <[{_ranges(words)}]>" if words else ""}
TEXT: /(.|\\n)*/
BLANKS: /[ \\n]{{0,8}}/
"""


def _any_arguments(tool: Tool) -> Tool:
    function = tool.function.model_copy(update={"parameters": {"type": "object"}})
    return tool.model_copy(update={"function": function})


def _or(what: str, token: int | None) -> str:
    return "" if token is None else " | " + what % token


def _ranges(tokens: Iterable[int]) -> str:
    """`3,5-9` of ascending numbers."""
    found: list[list[int]] = []
    for token in sorted(tokens):
        if found and found[-1][1] == token - 1:
            found[-1][1] = token
        else:
            found.append([token, token])
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in found)
