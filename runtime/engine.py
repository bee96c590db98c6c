"""An engine directory, opened: manifest verified, weights mapped, graph bound, text side ready.

Nothing of the builder or of transformers is imported. Weights are read from the page cache when they are first used, so
opening takes the time of one hash over the files and of binding some hundred nodes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engines.dtypes import DTYPES
from ..engines.manifest import Manifest
from ..engines.step import k_pages, v_pages
from ..engines.weights import load_graph, open_weights
from ..plugins import native
from ..plugins.interpreter import Program
from .request import SamplingParams
from .text import Text

TARGETS = ("cpu",)


@dataclass(frozen=True)
class Engine:
    """What serving needs of an engine directory. `text` is None where it has no tokenizer."""

    folder: Path
    manifest: Manifest
    program: Program
    torch_because: str | None  # why there are no native kernels, where torch's ops run instead
    text: Text | None
    generation_config: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Engine:
        """Raises EngineError: no engine there, a damaged one, or one for another target."""
        folder = Path(folder)
        manifest = Manifest.open(folder, targets=TARGETS)
        kernels = native.load(folder / manifest.target)
        binders = kernels.binders if isinstance(kernels, native.Kernels) else None
        program = Program(load_graph(folder), open_weights(folder), binders)
        torch_because = None if isinstance(kernels, native.Kernels) else kernels.reason
        path = folder / "generation_config.json"
        generation_config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(folder, manifest, program, torch_because, Text.open(folder), generation_config)

    def pools(self, num_pages: int, page_size: int) -> dict[str, torch.Tensor]:
        """Fresh KV pools by their input names, zeros: [num_pages, page_size, kv_heads, head_dim] for each layer.

        The memory is the system's zero pages, taken when first written. torch.zeros would write it now, and in this
        thread: an OpenMP pool more than there are CPUs makes libgomp put its threads to sleep between kernels instead
        of letting them spin, which costs a third of the speed.
        """
        dtype = DTYPES[self.manifest.model.dtype].torch
        pools = {}
        for i, layer in enumerate(self.manifest.kv_layers):
            for name, dim in ((k_pages(i), layer.head_dim), (v_pages(i), layer.v_head_dim)):
                shape = (num_pages, page_size, layer.kv_heads, dim)
                memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
                pools[name] = torch.from_numpy(memory).view(dtype).view(shape)
        return pools

    def default_params(self) -> SamplingParams:
        """Sampling as `generation_config.json` suggests, vLLM's way; what it leaves out has SamplingParams' default."""
        config = {name: value for name, value in self.generation_config.items() if value is not None}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        options = {name: config[name] for name in names if name in config}
        if "max_new_tokens" in config:
            options["max_tokens"] = config["max_new_tokens"]
        return SamplingParams(**options)
