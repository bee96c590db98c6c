"""An engine directory, opened: manifest verified, text side ready; executors read graph or plan and weights.

Nothing of the builder or of transformers is imported. Every byte that is used is hashed once: the weights of a cuda
engine by its executor as it reads them (those of a tensorrt engine are in its plan), everything else here. The
tokenizer is read meanwhile, in a thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.errors import EngineError, RequestError
from ..engines.manifest import Manifest
from ..engines.weights import WEIGHTS_FILE
from .request import SamplingParams
from .text import Text

TARGETS = ("cpu", "cuda", "tensorrt")


@dataclass(frozen=True)
class Engine:
    """What serving needs of an engine directory."""

    folder: Path
    manifest: Manifest
    generation_config: Mapping[str, Any]
    _text: Future[Text | None]

    @classmethod
    def open(cls, folder: str | os.PathLike, dummy: bool = False) -> Engine:
        """dummy: random weights will do, so the file of them may be missing.

        Raises EngineError: no engine there, a damaged one, or one for another target.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder, TARGETS)
        manifest.verify(folder, without=(WEIGHTS_FILE,) if dummy or manifest.target != "cpu" else ())
        with_text = ThreadPoolExecutor(1, thread_name_prefix="ingot-text")
        text = with_text.submit(Text.open, folder)
        with_text.shutdown(wait=False)
        path = folder / "generation_config.json"
        generation_config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(folder, manifest, generation_config, text)

    @property
    def text(self) -> Text | None:
        """Tokenizer and chat template, None where the engine has none. Raises EngineError: it cannot be read."""
        return self._text.result()

    def default_params(self) -> SamplingParams:
        """Sampling as `generation_config.json` suggests, vLLM's way; what it leaves out has SamplingParams' default.

        Raises EngineError: it suggests what cannot be.
        """
        config = {name: value for name, value in self.generation_config.items() if value is not None}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        options = {name: config[name] for name in names if name in config}
        if "max_new_tokens" in config:
            options["max_tokens"] = config["max_new_tokens"]
        try:
            return SamplingParams(**options)
        except RequestError as error:
            raise EngineError(
                f"generation_config.json of {self.folder} cannot be followed ({str(error).rstrip('.')}); mend it in the"
                " checkpoint and build the engine again."
            ) from None
