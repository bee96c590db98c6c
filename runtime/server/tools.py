"""Tool calls in what a model writes, by the formats in use: Hermes, Llama 3, Mistral.

    Hermes    <tool_call>{"name": .., "arguments": {..}}</tool_call>        (Qwen, Hermes and many others)
    Llama 3   the answer is {"name": .., "parameters": {..}}, several by ;  (optionally after <|python_tag|>)
    Mistral   [TOOL_CALLS][{"name": .., "arguments": {..}}, ..], later [TOOL_CALLS]name[ARGS]{..}

Text comes in pieces of any size; text goes out as soon as it is certain, a call when it is complete. Invariant: only a
well-formed call of a tool that was offered is a call; anything else stays text, to the letter.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import string
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .reasoning import overlap

HERMES, HERMES_END, MISTRAL, LLAMA = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
MARKERS = (HERMES, HERMES_END, MISTRAL, LLAMA, "[ARGS]", "[CALL_ID]")  # a tokenizer may have them as special tokens
OPENERS = (HERMES, MISTRAL, LLAMA)
_KEYS = "name|type|function|parameters|arguments"
_BARE = re.compile(rf'\s*\{{\s*"(?:{_KEYS})"\s*:')  # an answer that may be a call in Llama 3's format
_PERHAPS_BARE = re.compile(r'\s*(?:\{\s*(?:"(?P<key>[a-z]*)(?:"\s*)?)?)?')
# possessive: a model may write any number of blanks
_NAMED = re.compile(r"\s*+([\w.-]++)\s*+(?:\[CALL_ID\]\s*+\w++\s*+)?+(?:\[ARGS\])?+\s*+(?=\{)")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # it could not be written again
        raise ValueError(f"{digits[:60]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


class Call(NamedTuple):
    """A complete call; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


class ToolReader:
    """Finds the calls of the tools `names` in one answer. `parallel` False: only the first call counts.

    openers: the formats that are read. White space next to a call is dropped.
    """

    def __init__(self, names: Iterable[str], parallel: bool = True, openers: Sequence[str] = OPENERS):
        self._names, self._parallel, self._openers = frozenset(names), parallel, openers
        self._held, self._inside = "", ""  # inside: the opener whose call is being read
        self._at_start, self._after_call = LLAMA in openers, False
        self._space = ""  # not yet said
        self._examined = 0  # no closing tag of a call before here
        self.num_calls = 0

    def push(self, text: str, final: bool = False) -> list[str | Call]:
        """What is certain now; with `final`, all of it."""
        self._held += text
        found: list[str | Call] = []
        while (self._held or (final and self._inside)) and self._advance(found, final):
            pass
        if final and self._space and not self.num_calls:
            found.append(self._space)
        return found

    def _advance(self, found: list[str | Call], final: bool) -> bool:
        """One step; False if more text is needed."""
        if self._inside == HERMES:
            return self._hermes(found, final)
        if self._inside:
            if final:
                body, self._held, opener, self._inside = self._held, "", self._inside, ""
                self._mistral(found, body) if opener == MISTRAL else self._llama(found, body, opener)
            return False
        if self._at_start:
            if _BARE.match(self._held):
                self._inside = "{"
                return True
            perhaps = _PERHAPS_BARE.fullmatch(self._held)
            if perhaps and not final and any(key.startswith(perhaps["key"] or "") for key in _KEYS.split("|")):
                return False
            self._at_start = False
        openers = [(at, opener) for opener in self._openers if (at := self._held.find(opener)) >= 0]
        if openers:
            at, opener = min(openers)
            before, self._held, self._inside = self._held[:at], self._held[at + len(opener) :], opener
            self._say(found, before)
            return True
        keep = 0 if final else max(overlap(self._held, opener) for opener in self._openers)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        self._say(found, certain)
        return False

    def _hermes(self, found: list[str | Call], final: bool) -> bool:
        while (end := self._held.find(HERMES_END, self._examined)) >= 0:
            value, problem = _json(self._held[:end])
            if not problem.startswith("Unterminated string"):  # otherwise the tag is part of an argument
                calls = self._calls([value])
                body, self._held = self._held[:end], self._held[end + len(HERMES_END) :]
                self._inside, self._examined = "", 0
                self._take(found, calls, HERMES + body + HERMES_END)
                return True
            self._examined = end + 1
        if not final:
            return False
        body, self._held, self._inside = self._held, "", ""
        self._take(found, self._calls([_json(body)[0]]), HERMES + body)  # a model may stop instead of closing
        return False

    def _llama(self, found: list[str | Call], body: str, opener: str) -> None:
        calls, at = [], 0
        while call := self._calls([(value := _json_at(body, at))[0]]):
            calls += call
            at = value[1]
            while at < len(body) and (body[at].isspace() or body[at] == ";"):
                at += 1
        self._take(found, calls, (opener if opener == LLAMA else "") + body)
        if calls and body[at:]:
            self._say(found, body[at:])

    def _mistral(self, found: list[str | Call], body: str) -> None:
        for segment in body.split(MISTRAL):
            named = _NAMED.match(segment)
            if named:
                value, end = _json_at(segment, named.end())
                values: Any = [{"name": named[1], "arguments": value}]
            else:
                values, end = _json_at(segment, 0)
            calls = self._calls(values if isinstance(values, list) else [values], letters=9)  # its templates want 9
            self._take(found, calls, MISTRAL + segment)
            if calls and segment[end:].strip():
                self._say(found, segment[end:])

    def _calls(self, values: list[Any], letters: int = 0) -> list[Call]:
        """The calls that JSON values are; none if one of them is not."""
        calls = []
        for value in values:
            if isinstance(value, dict) and isinstance(value.get("function"), dict):
                value = value["function"]
            if not isinstance(value, dict):
                return []
            name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):  # some write the object as a string
                arguments = _json(arguments)[0]
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return []
            calls.append(Call(_call_id(letters), name, _text(arguments)))
        return calls

    def _take(self, found: list[str | Call], calls: list[Call], text: str) -> None:
        if not calls:
            self._say(found, text)
        for call in calls:
            self.num_calls += 1
            self._after_call, self._space = True, ""
            if self._parallel or self.num_calls == 1:
                found.append(call)

    def _say(self, found: list[str | Call], text: str) -> None:
        """White space waits until it is clear whether a call follows."""
        text = self._space + text
        body = text.rstrip()
        self._space = text[len(body) :]
        if self._after_call:
            body = body.lstrip()
        if body:
            self._after_call = False
            found.append(body)


class CallList:
    """Reads an answer that is bound to be a list of calls; one that was cut off stays text."""

    def __init__(self) -> None:
        self._held = ""
        self.num_calls = 0

    def push(self, text: str, final: bool = False) -> list[str | Call]:
        """The calls, when all is there."""
        self._held += text
        if not final:
            return []
        value, _ = _json(self._held)
        if not isinstance(value, list):
            return [self._held] if self._held else []
        self.num_calls = len(value)
        return [Call(_call_id(0), each["name"], _text(each["arguments"])) for each in value]


def _text(arguments: dict[str, Any]) -> str:
    """JSON that can be sent: half a character, which a model can spell as an escape, stays one."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text


def _json(text: str) -> tuple[Any, str]:
    """(value, "") or (None, what is wrong)."""
    try:
        return _DECODER.decode(text), ""
    except (ValueError, RecursionError) as error:
        return None, getattr(error, "msg", str(error))


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """(value, its end) or (None, start)."""
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


def _call_id(letters: int) -> str:
    if not letters:
        return f"call_{secrets.token_hex(12)}"
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(letters))
