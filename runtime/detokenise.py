"""Tokens to text, one at a time: no half character, no part of a stop string, constant work per token.

Byte-level and sentencepiece vocabularies are decoded piece by piece with a UTF-8 state, which is exact; any other
decoder runs on a short window. What `push` returns, up to `finish`, is the decoded answer, cut at the stop string.
A sentencepiece answer keeps the space it begins with, so that prompt + text is the whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from .request import SamplingParams

_REPLACEMENT = "\ufffd"


class Piecewise(Protocol):
    """The text that each further token adds, held back while a character is incomplete."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Pieces(Protocol):
    """A vocabulary that can start incremental decoding; `special` tokens are skipped if the request says so."""

    special: frozenset[int]

    def start(self, prompt: Sequence[int], skip_special: bool) -> Piecewise: ...


class Decoder:
    """Text of one answer: `push` tokens, then `finish`. After a stop string, `stopped` is set and the rest ignored."""

    def __init__(self, pieces: Pieces, params: SamplingParams, prompt: Sequence[int]):
        self._piecewise = pieces.start(prompt, params.skip_special_tokens)
        self._skipped = pieces.special if params.skip_special_tokens else frozenset()
        self._stop = params.stop_strings
        self._include_stop = params.include_stop_str_in_output
        self._unscanned = params.min_tokens  # tokens left whose text cannot stop the request
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """The text that is now certain, often that of `token`."""
        self._unscanned -= 1
        if self.stopped is not None or token in self._skipped:
            return ""
        text = self._piecewise.push(token)
        return self._scan(text) if self._stop and self._unscanned < 0 else text

    def finish(self) -> str:
        """What was held back: the answer ended otherwise."""
        if self.stopped is not None:
            return ""
        text, self._held = self._held + self._piecewise.flush(), ""
        return text

    def _scan(self, new: str) -> str:
        text = self._held + new
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            self._held = ""
            return text[: at + len(self.stopped)] if self._include_stop else text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def pieces_of(tokenizer: Tokenizer) -> Pieces:
    """How the tokenizer's decoder is taken apart."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}  # alone: the rest is megabytes
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevel(tokenizer)
    replaces = kinds[:1] == ["Replace"] and steps[0]["pattern"] == {"String": "▁"} and steps[0]["content"] == " "
    if replaces and kinds[1:] in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return Sentencepiece(tokenizer)
    return Windowed(tokenizer)


def _special(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 characters are themselves, the others follow from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class ByteLevel:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): each token is bytes, the text is the UTF-8 of all of them."""

    _ALPHABET = _byte_alphabet()

    def __init__(self, tokenizer: Tokenizer):
        self.special = _special(tokenizer)
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}  # filled as tokens come: opening a large vocabulary costs nothing

    def start(self, prompt: Sequence[int], skip_special: bool) -> Piecewise:
        return _Bytes(self)

    def bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token) or ""  # an id past the vocabulary (a padded head) has no text
        try:
            known = bytes(self._ALPHABET[c] for c in piece)
        except KeyError:  # an added token with a space, say: it stands for itself
            known = piece.encode()
        self._bytes[token] = known
        return known

    def get(self, token: int) -> bytes:
        found = self._bytes.get(token)
        return self.bytes_of(token) if found is None else found


class _Bytes:
    def __init__(self, vocabulary: ByteLevel):
        self._get = vocabulary.get
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._get(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


class Sentencepiece:
    """Sentencepiece BPE with byte fallback (Llama 2, Mistral, Gemma): pieces, with ▁ for space and <0xE2> for bytes.

    Characters made of byte tokens come out as they are completed. Where a run of byte tokens later turns out not to be
    UTF-8, only the bytes that fit nowhere become U+FFFD; the tokenizers library would replace the whole run.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.special = _special(tokenizer)
        self._tokenizer = tokenizer
        self._pieces: dict[int, str | bytes] = {}

    def start(self, prompt: Sequence[int], skip_special: bool) -> Piecewise:
        return _PiecesAndBytes(self)

    def get(self, token: int) -> str | bytes:
        found = self._pieces.get(token)
        if found is None:
            piece = self._tokenizer.id_to_token(token) or ""
            byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
            found = bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ")
            self._pieces[token] = found
        return found


class _PiecesAndBytes:
    def __init__(self, vocabulary: Sentencepiece):
        self._get = vocabulary.get
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def push(self, token: int) -> str:
        piece = self._get(token)
        if isinstance(piece, str):
            return self.flush() + piece if piece else ""
        pending = self._utf8.getstate()[0]
        try:
            return self._utf8.decode(piece)
        except UnicodeDecodeError:
            self._utf8.reset()
        if not pending:
            return _REPLACEMENT
        return _REPLACEMENT * len(pending) + self.push(token)  # this byte may begin a character of its own

    def flush(self) -> str:
        pending = self._utf8.getstate()[0]
        self._utf8.reset()
        return _REPLACEMENT * len(pending)


class Windowed:
    """Any other decoder: each token's text is the difference it makes to the text of the few tokens before it."""

    def __init__(self, tokenizer: Tokenizer):
        self.special = _special(tokenizer)
        self.tokenizer = tokenizer

    def start(self, prompt: Sequence[int], skip_special: bool) -> Piecewise:
        return _Window(self.tokenizer, list(prompt[-_Window.CONTEXT :]), skip_special)


class _Window:
    CONTEXT = 6  # tokens decoded again with each new one: enough for spaces that depend on the neighbour
    PATIENCE = 16  # tokens that may end in half a character before it is taken to be what it looks like

    def __init__(self, tokenizer: Tokenizer, context: list[int], skip_special: bool):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._tokens, self._num_said = context, len(context)

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._new(final=len(self._tokens) - self._num_said >= self.PATIENCE)

    def flush(self) -> str:
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        said = self._decode(self._tokens[: self._num_said])
        text = self._decode(self._tokens)
        if text.endswith(_REPLACEMENT) and not final:
            return ""
        self._tokens = self._tokens[-self.CONTEXT :]
        self._num_said = len(self._tokens)
        return text[len(said) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
