"""The small files an engine needs to turn text into tokens and back: tokenizer, chat template, generation defaults.

They are copied as they are; a tokenizer that exists only in a slow format is converted to `tokenizer.json`, so that
running an engine needs no transformers. A checkpoint without a tokenizer makes an engine that takes token ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.errors import BuildError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "chat_template.jinja", "chat_template.json")  # fmt: skip
SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def copy_text_files(checkpoint: Path, folder: Path) -> None:
    """Copy what is there of `COPIED`; make `tokenizer.json` if only a slow tokenizer is.

    Raises BuildError if the slow tokenizer cannot be converted, or the fast one is damaged.
    """
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if not (folder / "tokenizer.json").is_file() and any((checkpoint / name).is_file() for name in SLOW):
        _convert(checkpoint, folder)
    if (checkpoint / "tokenizer.json").is_file():
        open_tokenizer(checkpoint)


def open_tokenizer(checkpoint: Path) -> Tokenizer:
    """That of `tokenizer.json`. Raises BuildError if it cannot be read."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more precise
        raise BuildError(
            f"{checkpoint / 'tokenizer.json'} cannot be read ({' '.join(str(error).split())[:200]}); download it again."
        ) from None


def _convert(checkpoint: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, use_fast=True)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # a missing sentencepiece, an unknown class: transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BuildError(
            f"the tokenizer of {checkpoint} has no tokenizer.json and cannot be converted ({reason[:200]}); "
            "save it as a fast tokenizer with transformers and build again."
        ) from error


def generation_config(checkpoint: Path) -> dict[str, Any]:
    """`generation_config.json` as a dictionary, empty where there is none. BuildError if it cannot be read."""
    path = checkpoint / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BuildError(f"{path} is not valid JSON ({error}); download it again.") from None
