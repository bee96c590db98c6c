"""Text on its way in and tokens on their way out, from the engine directory's own files; transformers is not imported.

Encoding is the `tokenizers` library's; BOS and EOS are added as `tokenizer_config.json` says. Chat templates run in
jinja2's sandbox with what transformers gives them (tojson, raise_exception, strftime_now, loop controls, generation
blocks). Templates come from the internet: a failure in one is the request's error, never the server's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..engines.errors import EngineError, RequestError, shown
from .detokenise import Decoder, Pieces, pieces_of
from .request import SamplingParams

Message = Mapping[str, Any]
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class Text:
    """The tokenizer, chat template and decoder of an engine."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], template: str | None = None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.special_tokens = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        # an explicit setting replaces whatever the tokenizer's own template adds (transformers' TokenizersBackend)
        self._explicit = config.get("add_bos_token") is not None or config.get("add_eos_token") is not None
        self._prefix = self._affix("bos_token") if config.get("add_bos_token") else []
        self._suffix = self._affix("eos_token") if config.get("add_eos_token") else []
        self._template_source = template if template is not None else _default_template(config)
        self._template: Any = None  # compiled when first needed
        self.pieces: Pieces = pieces_of(tokenizer)
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)

    @classmethod
    def open(cls, folder: Path) -> Text | None:
        """The text side of an engine directory, or None if it has no tokenizer (it then serves token ids only)."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            return cls(
                Tokenizer.from_file(str(path)),
                json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {},
                template.read_text(encoding="utf-8") if template.is_file() else None,
            )
        except Exception as error:  # the library raises bare Exception
            raise EngineError(f"The tokenizer of {folder} cannot be read ({error}); build the engine again.") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with BOS and EOS as the model was trained unless told otherwise. Raises RequestError: no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell it
            raise RequestError(f"The prompt is not Unicode text: {error}.") from None
        if add_special_tokens and self._explicit:
            return [*self._prefix, *self.tokenizer.encode(text, add_special_tokens=False).ids, *self._suffix]
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def decoder(self, params: SamplingParams, prompt: Sequence[int]) -> Decoder:
        """A fresh incremental decoder for one answer to `prompt`."""
        return Decoder(self.pieces, params, prompt)

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        **values: Any,
    ) -> str:
        """The prompt of a conversation. `values` (tools, documents, enable_thinking..) go to the template as they are.

        Raises RequestError: no chat template, malformed messages, or the template refuses.
        """

        try:
            if template is not None:
                compiled = _environment().from_string(template)
            elif self._template_source is None:
                raise RequestError("The engine has no chat template; send a prompt instead, or give a chat_template.")
            else:
                if self._template is None:
                    self._template = _environment().from_string(self._template_source)
                compiled = self._template
            return compiled.render(
                **self.special_tokens, messages=[_message(m) for m in messages],
                add_generation_prompt=add_generation_prompt, **values,
            )  # fmt: skip
        except RequestError:
            raise
        except Exception as error:  # a template is a program: whatever it raises is the request's error
            what = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"The chat template refuses these messages: {what}.") from None

    @property
    def own_values(self) -> frozenset[str]:
        """Names that `values` of `render` cannot have: they are arguments of its own or the tokenizer's."""
        return frozenset(("self", "messages", "template", "add_generation_prompt", *self.special_tokens))

    def template_has(self, word: str) -> bool:
        """Whether the chat template speaks of `word`, a role for one."""
        return word in (self._template_source or "")

    def _affix(self, name: str) -> list[int]:
        token = self.tokenizer.token_to_id(self.special_tokens.get(name, ""))
        return [] if token is None else [token]

    def _token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _default_template(config: Mapping[str, Any]) -> str | None:
    """`chat_template` of tokenizer_config.json: a string, or named ones of which `default` is taken."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((t["template"] for t in template if t.get("name") == "default"), None)
    return template


def _message(message: Any) -> dict[str, Any]:
    """Templates are written for plain strings: text parts of a message are joined, anything else in it is refused."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"A message is {shown(message)}; it must be an object with role and content.")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(f"A message holds the part {shown(part)}; this engine reads text parts only.")
        return {**message, "content": "".join(part["text"] for part in content)}
    if content is not None and not isinstance(content, str):
        raise RequestError(f"The content of a message is {shown(content)}; it must be text.")
    return dict(message)


@lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks assistant text for training; here it is its own content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
