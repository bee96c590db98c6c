"""What users may pass as prompts, and what every prompt must satisfy before anything is scheduled.

The forms are vLLM's: text, token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of such. Where both
keys are given, the token ids are run and the text is only shown. vLLM's other keys (multi_modal_data, cache_salt, ..)
would change the answer or who shares the cache: refused, unless None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

from ..engines.errors import RequestError, shown
from .text import Text

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
_KEYS = ("prompt", "prompt_token_ids")


@dataclass(frozen=True)
class Limits:
    """What a prompt is checked against."""

    vocab_size: int
    max_model_len: int
    kv_capacity: int  # tokens in the whole KV pool


def split(prompts: Any) -> list[Prompt]:
    """One prompt or several -> several. A list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"The prompt is {shown(prompts)}; it must be text, a list of token ids, or a list of those.")
    if prompts and all(issubclass(kind, Integral) for kind in set(map(type, prompts))):
        return [prompts]
    return list(prompts)


def tokens_of(prompt: Prompt, text: Text | None, limits: Limits) -> tuple[str | None, list[int]]:
    """The prompt's text, if it was one, and its checked token ids.

    Raises RequestError: not a prompt, a key that is not known, empty, longer than the context or the KV pool, or an
    unknown token id.
    """
    words: str | None = None
    if isinstance(prompt, Mapping):
        words, prompt = _of_mapping(prompt)
    if isinstance(prompt, str):
        if text is None and prompt:
            raise RequestError("This engine has no tokenizer; send token ids instead of text.")
        words, ids = prompt, text.encode(prompt) if text else []
    else:
        ids = _ids(prompt, limits.vocab_size)
    check_length(len(ids), limits)
    return words, ids


def _of_mapping(prompt: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The text that is shown, if any, and what is run: text or token ids."""
    given = {key: value for key, value in prompt.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise RequestError(
                f"The prompt has the key {shown(key)}, which is not supported; its keys are prompt (text) and "
                "prompt_token_ids: leave it out."
            )
    words, ids = given.get("prompt"), given.get("prompt_token_ids")
    if not given:
        raise RequestError("The prompt is a mapping without a value; give it prompt (text) or prompt_token_ids.")
    if words is not None and not isinstance(words, str):
        raise RequestError(f"The prompt's key prompt is {shown(words)}; it must be text: give prompt_token_ids.")
    if isinstance(ids, str):
        raise RequestError(f"The prompt's prompt_token_ids is {shown(ids)}; it must be a list of token ids.")
    return words, words if ids is None else ids


def check_length(num: int, limits: Limits) -> None:
    """Raises RequestError unless a prompt of `num` tokens leaves room for one more."""
    if not num:
        raise RequestError("The prompt is empty; it needs at least one token.")
    if num >= limits.max_model_len:
        raise RequestError(
            f"The prompt has {num} tokens; the context holds {limits.max_model_len}, at least one of them new: "
            "shorten the prompt or raise max_model_len."
        )
    if num > limits.kv_capacity:
        raise RequestError(
            f"The prompt has {num} tokens; the whole KV pool holds {limits.kv_capacity}: "
            "shorten the prompt or give the pool more memory."
        )


def _ids(prompt: Any, vocab_size: int) -> list[int]:
    several = isinstance(prompt, Sequence) and not isinstance(prompt, bytes)  # bytes are numbers, too, but no tokens
    kinds = set(map(type, prompt)) if several else {str}  # of few types, however long a prompt is
    if not all(issubclass(kind, Integral) and kind is not bool for kind in kinds):
        raise RequestError(f"The prompt is {shown(prompt)}; it must be text or a list of token ids.")
    ids = list(map(int, prompt))
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        token = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"The prompt holds token {shown(token)}; the model's tokens are 0 to {vocab_size - 1}.")
    return ids
