"""What a calibration found, and the file that keeps it: one safetensors file, so any tool can look into it.

Small by intent: what rounding to nearest makes of a checkpoint is not in it, only what was searched for. The exception
is GPTQ, whose result is the rounding itself, so its weights are kept whole (int4 as two in a byte).
Invariant: a file is complete or not there; it is written beside its place and renamed.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines.errors import BuildError
from .formats import Format, Quantised

VERSION = 1
KINDS = "smoothing", "clipping", "activations", "kv"


@dataclass
class Scales:
    """By name of a Linear's weight in the engine's graph [N, K], or of a KV pool (`k_pages.3`)."""

    weights: dict[str, Quantised] = field(default_factory=dict)  # those that are not just rounded: GPTQ's
    smoothing: dict[str, Tensor] = field(default_factory=dict)  # [K] columns are multiplied by it, what is read divided
    clipping: dict[str, Tensor] = field(default_factory=dict)  # shape of the weight's scale: ratio of the range covered
    activations: dict[str, Tensor] = field(default_factory=dict)  # [] scale of what the Linear reads, the same for all
    kv: dict[str, Tensor] = field(default_factory=dict)  # [1], or [kv_heads]: scale of the pool
    about: dict[str, Any] = field(default_factory=dict)  # JSON: recipe, model, text

    def save(self, path: Path) -> None:
        """Writes the file, or leaves what was there."""
        from safetensors.torch import save_file

        tensors = {f"{kind}/{name}": value for kind in KINDS for name, value in getattr(self, kind).items()}
        formats = {}
        for name, quantised in self.weights.items():
            formats[name] = asdict(quantised.format)
            packed = quantised.format.dtype == "int4" and quantised.values.shape[1] % 2 == 0
            tensors[f"values/{name}"] = _pack(quantised.values) if packed else quantised.values
            tensors[f"scale/{name}"] = quantised.scale
            if quantised.zero is not None:
                tensors[f"zero/{name}"] = quantised.zero
        header = {"version": str(VERSION), "about": json.dumps(self.about), "formats": json.dumps(formats)}
        beside = path.with_name(path.name + ".part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, header)
        os.replace(beside, path)

    @classmethod
    def open(cls, path: Path) -> Scales:
        """Raises BuildError: no such file, or one that `save` did not write."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if header.get("version") != str(VERSION):
                raise ValueError(f"its version is {header.get('version')}, expected {VERSION}")
            scales = cls(about=json.loads(header["about"]))
            for name, form in json.loads(header["formats"]).items():
                scale, values = tensors.pop(f"scale/{name}"), tensors.pop(f"values/{name}")
                values = _unpack(values) if values.dtype == torch.uint8 else values
                scales.weights[name] = Quantised(Format(**form), values, scale, tensors.pop(f"zero/{name}", None))
            for key, tensor in tensors.items():
                kind, _, name = key.partition("/")
                if kind not in KINDS:
                    raise ValueError(f"it holds the unknown tensor '{key}'")
                getattr(scales, kind)[name] = tensor
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BuildError(
                f"{path} is not a file of scales ({error}); make one with `ingot calibrate MODEL -o FILE`."
            ) from error
        return scales


def _pack(values: Tensor) -> Tensor:
    """int8 numbers -8 .. 7 [N, K] -> uint8 [N, K / 2], the first of two in the lower half."""
    low, high = (values[:, ::2] & 15).to(torch.uint8), (values[:, 1::2] & 15).to(torch.uint8)
    return low | high << 4


def _unpack(packed: Tensor) -> Tensor:
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return (both ^ 8).to(torch.int8) - 8
