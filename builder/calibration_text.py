"""The text that a model is calibrated with and, held out, checked with: from a file, or a dataset of the hub.

A document is what a model sees at once: a text file, a line of JSON Lines, a row of a dataset. Each is encoded on its
own, with the special tokens it begins with; chats go through the model's own template. Their tokens are laid end to end
and cut into windows, spread over all of it, of which every fifth is held out: no window is in both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from ..engines.errors import BuildError
from ..engines.extras import pip_install
from .checkpoint import Checkpoint
from .node_major import Windows
from .text_files import open_tokenizer

NUM_TOKENS, WIDTH = 1 << 15, 512  # tokens to calibrate with (a quarter as many again to check with), and of a window
FEWEST = 2048  # tokens of text that say anything
BATCH = 2048  # tokens of a step: bounds the logits in memory
LONGEST = 32 << 20  # characters of a source that are read, or more where more tokens are wanted
SOME = 1 << 20  # characters of documents that are encoded at once, on all cores
FILES = {".txt", ".jsonl", ".json", ".md", ".py"}  # what ends so is meant to be a file, there or not
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.+%\[\]:-]+))?")


@dataclass(frozen=True)
class Text:
    """Windows to calibrate with and, taken from between them, windows to check with."""

    calibration: tuple[Windows, ...]
    held_out: tuple[Windows, ...]

    @classmethod
    def read(
        cls, source: Path | str, checkpoint: Checkpoint, num_tokens: int = NUM_TOKENS, width: int | None = None
    ) -> Text:
        """From a text file, JSON Lines with a `text` or `messages` in each, a dataset directory, or `org/name[:split]`.

        num_tokens: to calibrate with at most. width: of a window; None: 512, or less where there is little text.
        Raises BuildError: nothing there, no text in it or too little, a checkpoint without a tokenizer, windows that
        the model cannot read.
        """
        longest = checkpoint.config.get_text_config().max_position_embeddings
        if width is not None and not 2 <= width <= longest:
            raise BuildError(f"calibration windows of {width} tokens were asked for; expected 2 to {longest}.")
        ids = list(islice(_token_ids(str(source), checkpoint, 20 * num_tokens), max(LONGEST, 2 * num_tokens)))
        if len(ids) < FEWEST:
            raise BuildError(f"{source} has {len(ids)} tokens of text; calibration needs at least {FEWEST}.")
        width = width or min(WIDTH, len(ids) // 10, longest)
        if len(ids) < 2 * width:
            raise BuildError(f"{source} has {len(ids)} tokens, which is no two windows of {width}; give it more text.")
        windows = torch.tensor(ids[: len(ids) // width * width], dtype=torch.int32).view(-1, width)
        wanted = max(num_tokens // width, 1)
        wanted += max(wanted // 4, 1)
        every = windows[torch.linspace(0, len(windows) - 1, min(len(windows), wanted)).long()]
        held = torch.arange(len(every)) % 5 == (4 if len(every) > 4 else len(every) - 1)
        batch = max(BATCH // width, 1)
        return cls(*(tuple(map(Windows, every[part].split(batch))) for part in (~held, held)))

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens to calibrate with, and to check with."""
        calibration, held_out = (sum(w.tokens.numel() for w in part) for part in (self.calibration, self.held_out))
        return calibration, held_out

    @property
    def digest(self) -> str:
        """Of all windows: the same for the same tokens, wherever they came from."""
        found = hashlib.sha256()
        for part in (self.calibration, self.held_out):
            found.update(b"|")
            for windows in part:
                found.update(repr(tuple(windows.tokens.shape)).encode() + windows.tokens.numpy().tobytes())
        return found.hexdigest()


def _token_ids(source: str, checkpoint: Checkpoint, num_characters: int) -> Iterator[int]:
    file = checkpoint.path / "tokenizer.json"
    if not file.is_file():
        raise BuildError(
            f"{checkpoint.path} has no tokenizer.json, so {source} cannot be read for it; add the tokenizer."
        )
    tokenizer = open_tokenizer(checkpoint.path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    some, template = False, _ChatTemplate(checkpoint)
    for documents in _by_size(_documents(source, num_characters)):
        for chat, group in groupby(documents, lambda document: isinstance(document, list)):
            texts = [template(document) if isinstance(document, list) else document for document in group]
            # JSON can say half of a surrogate pair, where text was cut off; no tokenizer takes one
            texts = [text.encode("utf-8", "replace").decode() for text in texts]
            for encoding in tokenizer.encode_batch([t for t in texts if t.strip()], add_special_tokens=not chat):
                some = True
                yield from encoding.ids
    if not some:
        raise BuildError(f"the calibration text {source} is empty; give it some {FEWEST} tokens or more.")


def _by_size(documents: Iterable[str | list[Any]]) -> Iterator[list[str | list[Any]]]:
    """Documents of some `SOME` characters at a time."""
    held: list[str | list[Any]] = []
    room = SOME
    for document in documents:
        held.append(document)
        room -= len(document) if isinstance(document, str) else len(str(document))
        if room <= 0:
            yield held
            held, room = [], SOME
    if held:
        yield held


def _documents(source: str, num_characters: int) -> Iterator[str | list[Any]]:
    """Texts, and conversations as lists of messages. What has many documents is read until there are enough."""
    path, found = Path(source), _DATASET.fullmatch(source)
    if path.is_dir() or (not path.is_file() and found and path.suffix.lower() not in FILES):
        name, split = (source, "") if path.is_dir() or found is None else (found["name"], found["split"])
        yield from _enough(_rows(name, split or "train", source), num_characters)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".jsonl":
                yield from _enough(_lines(file, path), max(LONGEST, num_characters // 2))
            else:
                yield file.read(max(LONGEST, num_characters // 2))
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"the calibration text {path} cannot be read: {error}.") from error


def _lines(lines: Iterable[str], path: Path) -> Iterator[str | list[Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = line.strip()
            yield _document(entry, f"line {number} of {path}")


def _rows(name: str, split: str, source: str) -> Iterator[str | list[Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BuildError(
            f"the dataset {source} is read by the library `datasets`, which is not installed; "
            f"install it with {pip_install('datasets')}, or give a file of text."
        ) from error
    try:
        for number, row in enumerate(load_dataset(name, split=split, streaming=True), 1):
            yield _document(row, f"row {number} of the dataset {source}")
    except BuildError:
        raise
    except Exception as error:  # no such name or split, offline, gated, a file in it is damaged: all kinds of classes
        reason = " ".join(str(error).split())[:200]
        raise BuildError(
            f"the dataset {source} cannot be read ({type(error).__name__}: {reason}); "
            "check its name, the split after the colon and the network, or give a file of text."
        ) from error


def _document(entry: Any, where: str) -> str | list[Any]:
    if isinstance(entry, dict):
        if isinstance(entry.get("text"), str):
            return entry["text"]
        if isinstance(entry.get("messages"), list) and entry["messages"]:
            return entry["messages"]
    found = f"the keys {', '.join(map(str, entry))[:80]}" if isinstance(entry, dict) else repr(entry)[:60]
    raise BuildError(f'{where} is not an object with a "text" or "messages"; found {found}.')


def _enough(documents: Iterable[str | list[Any]], num_characters: int) -> Iterator[str | list[Any]]:
    for document in documents:
        yield document
        num_characters -= len(document) if isinstance(document, str) else len(str(document))
        if num_characters <= 0:
            return


class _ChatTemplate:
    """The checkpoint's own, loaded when the first conversation comes."""

    def __init__(self, checkpoint: Checkpoint):
        self._path = checkpoint.path
        self._tokenizer: Any = None

    def __call__(self, messages: list[Any]) -> str:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = self._tokenizer or AutoTokenizer.from_pretrained(self._path)
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # no template, a template that refuses the roles, messages that are none
            reason = " ".join(str(error).split())[:200]
            raise BuildError(
                f"the messages {str(messages)[:60]}.. cannot be put through the chat template of {self._path} "
                f'({type(error).__name__}: {reason}); give lines with a "text" instead.'
            ) from error
