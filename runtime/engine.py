"""An engine directory, opened: manifest verified, text side ready; executors read graph or plan and weights.

Nothing of the builder or of transformers is imported; opening takes the time of one hash over the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.manifest import Manifest
from .request import SamplingParams
from .text import Text

TARGETS = ("cpu", "cuda")


@dataclass(frozen=True)
class Engine:
    """What serving needs of an engine directory. `text` is None where it has no tokenizer."""

    folder: Path
    manifest: Manifest
    text: Text | None
    generation_config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Engine:
        """Raises EngineError: no engine there, a damaged one, or one for another target."""
        folder = Path(folder)
        manifest = Manifest.open(folder, targets=TARGETS)
        path = folder / "generation_config.json"
        generation_config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(folder, manifest, Text.open(folder), generation_config)

    def default_params(self) -> SamplingParams:
        """Sampling as `generation_config.json` suggests, vLLM's way; what it leaves out has SamplingParams' default."""
        config = {name: value for name, value in self.generation_config.items() if value is not None}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        options = {name: config[name] for name in names if name in config}
        if "max_new_tokens" in config:
            options["max_tokens"] = config["max_new_tokens"]
        return SamplingParams(**options)
