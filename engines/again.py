"""The commands that make an engine again, for sentences which say that one cannot serve as it is.

An option is written as it is given to `build-engine`: `{"max_num_seqs": 64, "tune": False}` is
`--max-num-seqs 64 --no-tune`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from shlex import quote
from typing import Any


def from_checkpoint(folder: str | os.PathLike, manifest: Mapping[str, Any], **changed: Any) -> str:
    """A build as the engine's was, but for what is `changed`. manifest: the fields of its JSON, as they are found."""
    model, build, target = (manifest.get(key) for key in ("model", "build", "target"))
    source = model.get("source") if isinstance(model, dict) else None
    options = build.get("options") if isinstance(build, dict) else None
    given = {"target": target} if target not in (None, "cpu") else {}
    given |= (options if isinstance(options, dict) else {}) | changed
    return f"`build-engine {quote(str(source or 'MODEL'))} -o {quote(str(folder))} --force{_words(given)}`"


def from_engine(folder: str | os.PathLike, **options: Any) -> str:
    """Its plan and kernels anew, and nothing else: what is not given stays, and the checkpoint is not needed."""
    return f"`ingot build --retarget {quote(str(folder))}{_words(options)}`"


def _words(options: Mapping[str, Any]) -> str:
    return "".join(f" {_word(name.replace('_', '-'), value)}" for name, value in options.items())


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {quote(str(value))}"
