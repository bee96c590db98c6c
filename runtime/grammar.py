"""Structured outputs: what an answer may be (a JSON schema, a regex, a choice, a grammar) as masks over the vocabulary.

The grammar itself is llguidance's. A matcher follows one answer, token by token, on the host; the mask of a step is
worked out while the step before it runs. What the library does not know of a schema is refused by name when the
request comes, never ignored; where it gives up on an answer later, as on grammars that are too ambiguous, that request
fails alone. Invariant: a token that is sampled under a mask is one that the matcher accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from ..engines.errors import RequestError, shown
from ..engines.extras import pip_install
from .speculation.tree import Tree, parents_of

MOST_BYTES = 1 << 17  # of a schema or grammar: compiling takes time that others wait for
WORD = 32  # tokens of a word of a mask
# between the parts of JSON: as people write it, but no more, since models may go on with blanks until max_tokens
BLANKS = r"(\n {0,32}| ?)"


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """What an answer must be: exactly one of these (vLLM's names). Raises RequestError.

    json: a JSON schema, as an object or as text. json_object: any JSON object. regex: a regular expression (Rust's
    syntax, without look-around). choice: one of these strings. grammar: a context-free grammar, Lark's or GBNF.
    """

    json: Mapping[str, Any] | str | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise RequestError(
                f"structured_outputs asks for {found}; it must be one of json, json_object, regex, choice and grammar."
            )
        if self.choice is not None:
            several = isinstance(self.choice, Sequence) and not isinstance(self.choice, str)
            if not several or not self.choice or not all(isinstance(each, str) and each for each in self.choice):
                raise RequestError(f"choice is {shown(self.choice)}; it must be a list of strings that are not empty.")
            object.__setattr__(self, "choice", tuple(self.choice))
        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object is {shown(self.json_object)}; it must be true or false.")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(f"{name} is {shown(getattr(self, name))}; it must be text.")
        if not isinstance(self.json, str | bool | None):  # as text it can be hashed, and kept as it was
            try:
                object.__setattr__(self, "json", json.dumps(self.json))
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(f"json is {shown(self.json)}; it must be a schema in JSON ({error}).") from None

    @property
    def source(self) -> tuple[str, str]:
        """(kind, text) of what is asked for."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.choice is not None:
            return "choice", json.dumps(self.choice)
        name = next(name for name in ("json", "regex", "grammar") if getattr(self, name) is not None)
        value = getattr(self, name)
        return name, value if isinstance(value, str) else json.dumps(value)


class Matcher:
    """Follows one answer. Made by `Grammars.matcher`; used by whoever owns the request.

    Drafts are followed by copies, which cost 2 us: a matcher of llguidance 1.9 that is rolled back behind a mask gives
    wrong masks later, and one that failed on a draft stays failed.
    """

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._num_tokens = 0  # of the answer
        self._words = -(-vocab_size // WORD)
        self._mask: np.ndarray | None = None

    def advance(self, token: int) -> bool:
        """The answer goes on with `token`; True if nothing can follow it. Raises RequestError: the library
        gave up, here or while it worked out `mask`."""
        self._mask = None
        self._num_tokens += 1
        if not self._matcher.consume_token(token):
            raise RequestError(
                f"structured_outputs cannot be kept after {self._num_tokens} tokens of the answer"
                f" ({_short(self._matcher.get_error())}); give a simpler grammar."
            )
        return self._matcher.is_stopped()

    def fitting(self, drafts: Sequence[int]) -> Sequence[int]:
        """Those of `drafts` that may come next, each after those that it follows, without ending the answer."""
        fit = [behind is not None and not behind.is_stopped() for behind in self._followed(drafts)]
        if isinstance(drafts, Tree):
            return drafts.keep(fit)
        return drafts[: (*fit, False).index(False)]

    def masks(self, drafts: Sequence[int]) -> list[np.ndarray]:
        """`mask` now and after each of `drafts`, all of which fit: what a token may be if those before it hold."""
        return [self.mask, *map(self._mask_of, self._followed(drafts))]

    def _followed(self, drafts: Sequence[int]) -> list[Any]:
        """The matcher behind each of `drafts` and what it follows; None where that does not fit."""
        found: list[Any] = []
        for token, parent in zip(drafts, parents_of(drafts), strict=True):
            before = found[parent] if parent >= 0 else self._matcher
            behind = None if before is None else before.deep_copy()
            found.append(None if behind is None or not behind.consume_token(token) else behind)
        return found

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    @property
    def mask(self) -> np.ndarray:
        """[ceil(vocabulary / 32)] int32: a bit for each token, the lowest first, 1 where it may come next."""
        if self._mask is None:
            self._mask = self._mask_of(self._matcher)
        return self._mask

    def _mask_of(self, matcher: Any) -> np.ndarray:
        found, mask = np.frombuffer(matcher.compute_bitmask(), np.int32), np.zeros(self._words, np.int32)
        mask[: min(self._words, len(found))] = found[: self._words]
        return mask


class Grammars:
    """Compiles grammars for a tokenizer. tokenizer: the text of tokenizer.json. Raises RequestError: no llguidance."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Collection[int]):
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                f"Structured outputs need llguidance ({error}); install it with {pip_install('serve')}."
            ) from None
        self._library = llguidance
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=sorted(eos_token_ids) or None)
        self._compiled = lru_cache(maxsize=256)(self._compile)

    def matcher(self, wanted: StructuredOutputs) -> Matcher:
        """At the beginning of an answer. Raises RequestError: the library refuses the schema or grammar."""
        return Matcher(self._compiled(*wanted.source).deep_copy(), self._vocab_size)

    def _compile(self, kind: str, text: str) -> Any:
        if len(text) > MOST_BYTES:
            raise RequestError(
                f"The {kind} of structured_outputs has {len(text)} characters, at most {MOST_BYTES} are taken."
            )
        try:
            if kind == "json":
                json.loads(text)
                grammar = self._library.LLMatcher.grammar_from_json_schema(text, {"whitespace_pattern": BLANKS})
            elif kind == "choice":  # as one word: as rules of a grammar there can be 2,000 that begin alike
                grammar = self._library.grammar_from("regex", "|".join(map(re.escape, json.loads(text))))
            else:
                grammar = self._library.grammar_from(kind, text)  # type: ignore[arg-type]
        except ValueError as error:
            raise RequestError(f"The {kind} of structured_outputs cannot be read: {_short(error)}.") from None
        if wrong := self._library.LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise RequestError(f"The {kind} of structured_outputs is refused: {_short(wrong)}.")
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"The {kind} of structured_outputs is refused: {_short(matcher.get_error())}.")
        return matcher


def _short(message: Any) -> str:
    said = str(message).partition("<state>")[0]  # what follows is for the library's authors
    return " ".join(said.split())[:300].rstrip(".")
