"""Checkpoints that are quantised already, read as they are: one file per format, and the table of them.

`describe` finds what a checkpoint says of itself, `open_quantised` turns its tensors into `StoredModule`s: the stored
numbers in the terms of `calibration.formats`, how activations are quantised, the order of columns. Which modules are
quantised is read off the tensors, so layers that the config ignores need no rule: they have none of these tensors.
An unknown scheme, and an option of a known one that engines cannot compute, is refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...engines.errors import BuildError
from . import awq, compressed_tensors, fp8, gptq, modelopt
from .kv import KVScales, read_kv
from .stored import Parts, StoredModule, by_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..checkpoint import StoredTensor

__all__ = ["KVScales", "QuantisedWeights", "StoredModule", "describe", "open_quantised"]

MODELOPT_FILE = "hf_quant_config.json"


class Method(NamedTuple):
    """How a format is read. `kv_dtype(config)`: numbers of the KV cache, None as they are."""

    read: Callable[[Mapping[str, Any], Mapping[str, Parts]], dict[str, StoredModule]]
    kv_dtype: Callable[[Mapping[str, Any]], str | None] = lambda config: None


METHODS = {
    "compressed-tensors": Method(compressed_tensors.read, compressed_tensors.kv_dtype),
    "awq": Method(awq.read),
    "gptq": Method(gptq.read),
    "fp8": Method(fp8.read),
    "modelopt": Method(modelopt.read, modelopt.kv_dtype),
}  # by `quant_method` of the quantization_config


@dataclass(frozen=True)
class QuantisedWeights:
    """What a checkpoint stores in few bits: modules by their names in it, and the scales of its KV cache."""

    method: str
    modules: Mapping[str, StoredModule]
    kv: KVScales | None

    def spelt(self) -> str:
        """`compressed-tensors: 8 weights as fp8_e4m3; activations fp8_e4m3, for each token`."""
        kinds = Counter(module.spelt() for module in self.modules.values())
        words = [f"{count} weights as {kind}" for kind, count in kinds.most_common()]
        return f"{self.method}: {', '.join(words)}"


def describe(path: Path, config: PretrainedConfig) -> Mapping[str, Any] | None:
    """What the checkpoint says of its quantisation, None if it is not quantised; taken out of `config`, so that the
    model is built as it is without. Raises BuildError: a method that is not known."""
    found: Any = None
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None):
            found = getattr(config, key)
            delattr(config, key)
    if not found and (path / MODELOPT_FILE).is_file():
        try:
            found = {"quant_method": "modelopt", **json.loads((path / MODELOPT_FILE).read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise BuildError(f"{path / MODELOPT_FILE} is not a JSON object ({error}); download it again") from None
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = found.get("quant_method")
    if method not in METHODS:
        raise BuildError(
            f"{path} is quantised by {method}, which ingot does not read (it reads {', '.join(METHODS)}); give the "
            "unquantised checkpoint, with --quant to have it quantised"
        )
    return found


def open_quantised(
    path: Path,
    description: Mapping[str, Any],
    config: PretrainedConfig,
    stored: Mapping[str, StoredTensor],
    read: Callable[[str], Tensor],
) -> QuantisedWeights:
    """The quantised modules of a checkpoint; `read(name)` gives a stored tensor. No weight is read.

    Raises BuildError: an option that is not served, a tensor that is missing or does not fit, nothing quantised.
    """
    method = str(description["quant_method"])
    modules = by_module(path, stored, read)
    quantised = METHODS[method].read(description, modules)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kv = read_kv(path, METHODS[method].kv_dtype(description), modules, config.num_hidden_layers, heads)
    if not quantised and kv is None:
        raise BuildError(
            f"{path} says that it is quantised by {method}, but stores no weight so; take the quantization_config out "
            "of its config.json, or use config and weights of the same checkpoint"
        )
    return QuantisedWeights(method, quantised, kv)
