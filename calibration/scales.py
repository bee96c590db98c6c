"""What a calibration found, and the file that keeps it: one safetensors file, so any tool can look into it.

Small by intent: what rounding to nearest makes of a checkpoint is not in it, only what was searched for. The exception
is GPTQ, whose result is the rounding itself, so its weights are kept whole (int4 as two in a byte).
Invariants: a file is complete or not there; it is written beside its place and renamed. What is read of it is what was
written: it has the hash of each tensor, and those that are read when asked for are checked then.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engines.errors import BuildError
from ..engines.weights import Weight, of_tensor, write_weights
from . import QuantisationError
from .accuracy import Accuracy
from .formats import Format, Quantised, all_finite

VERSION = 1
KINDS = "smoothing", "clipping", "activations", "kv"
OFFSET = "k_offset."  # begins the names of what, of `kv`, is no scale
ABOUT = {"model": str, "text": str, "recipe": dict, "mixed": dict, "accuracy": dict}


class StoredWeights(MutableMapping[str, Quantised]):
    """Weights by name, in memory or in a file that `Scales.save` wrote: those are read when asked for and not kept."""

    def __init__(self) -> None:
        self._places: dict[str, Quantised | Path] = {}

    def __getitem__(self, name: str) -> Quantised:
        place = self._places[name]
        return _read(place, name) if isinstance(place, Path) else place

    def __setitem__(self, name: str, quantised: Quantised) -> None:
        self._places[name] = quantised

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def stored(self, name: str, path: Path) -> None:
        """The weight is in this file from now on."""
        self._places[name] = path


@dataclass
class Scales:
    """By name of a Linear's weight in the engine's graph [N, K], or of a KV pool (`k_pages.3`)."""

    # those that are not just rounded: GPTQ's
    weights: MutableMapping[str, Quantised] = field(default_factory=StoredWeights)
    smoothing: dict[str, Tensor] = field(default_factory=dict)  # [K] columns are multiplied by it, what is read divided
    clipping: dict[str, Tensor] = field(default_factory=dict)  # shape of the weight's scale: ratio of the range covered
    activations: dict[str, Tensor] = field(default_factory=dict)  # [] scale of what the Linear reads, the same for all
    kv: dict[str, Tensor] = field(default_factory=dict)  # [1], or [kv_heads]: scale of the pool
    about: dict[str, Any] = field(default_factory=dict)  # JSON: recipe, model, text

    def keep(self, kind: str, name: str, found: Tensor | Quantised) -> None:
        """Adds what was found on whatever device: scales are the host's. kind: a field, as `activations`."""
        getattr(self, kind)[name] = found.to("cpu")

    def save(self, path: Path) -> None:
        """Writes the file, one weight in memory at a time, or leaves what was there."""
        scales = {f"{kind}/{name}": value for kind in KINDS for name, value in getattr(self, kind).items()}
        found = [of_tensor(name, value) for name, value in scales.items()]
        formats, hashes = {}, {name: _hash(value) for name, value in scales.items()}
        for name in self.weights:
            quantised = self.weights[name]
            formats[name] = asdict(quantised.format)
            for key, tensor in _tensors(quantised).items():
                here = of_tensor(f"{key}/{name}", tensor)
                hashes[here.name] = _hash(tensor)
                found.append(Weight(here.name, here.dtype, here.shape, partial(self._load, name, key)))
            del quantised, tensor, here  # it may be in a file
        header = {"version": str(VERSION), "about": json.dumps(self.about), "formats": json.dumps(formats)}
        header["hashes"] = json.dumps(hashes | {part: _hash(text.encode()) for part, text in header.items()})
        beside = path.with_name(path.name + ".part")
        try:
            write_weights(beside, found, metadata=header)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def _load(self, name: str, key: str) -> np.ndarray:
        return of_tensor(name, _tensors(self.weights[name])[key]).load()

    @classmethod
    def open(cls, path: Path) -> Scales:
        """Weights are read when they are asked for. Raises BuildError: no such file, or one that `save` did not
        write."""
        from safetensors import SafetensorError, safe_open

        try:
            weights = StoredWeights()
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("version") != str(VERSION):
                    raise ValueError(f"its version is {header.get('version')}, expected {VERSION}")
                hashes = _hashes(header)
                for part in ("about", "formats"):
                    _check(path, part, header[part].encode(), hashes)
                scales, keys = cls(weights, about=_about(header["about"])), set(file.keys())
                for name, form in json.loads(header["formats"]).items():
                    if not Format(**form).symmetric:
                        keys.remove(f"zero/{name}")
                    keys -= {f"scale/{name}", f"values/{name}"}
                    weights.stored(name, path)
                for key in sorted(keys):
                    kind, _, name = key.partition("/")
                    if kind not in KINDS:
                        raise ValueError(f"it holds the unknown tensor '{key}'")
                    tensor = getattr(scales, kind)[name] = file.get_tensor(key).clone()
                    _check(path, key, tensor, hashes)
                    if not _sound(tensor, above=None if name.startswith(OFFSET) else 0):
                        raise ValueError(f"'{key}' is no float32 tensor of finite numbers above 0")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError,
                QuantisationError) as error:  # fmt: skip
            raise BuildError(
                f"{path} is not a file of scales ({error}); make one with `ingot calibrate MODEL -o FILE`."
            ) from error
        return scales


def _hash(data: Tensor | bytes) -> str:
    raw = data.contiguous().reshape(-1).view(torch.uint8).numpy().data if isinstance(data, Tensor) else data
    return hashlib.sha256(raw).hexdigest()


def _hashes(header: Mapping[str, str]) -> dict[str, str] | None:
    """By name of a tensor or of a part of the header. None: the file is of the time before it had any."""
    return json.loads(header["hashes"]) if "hashes" in header else None


def _check(path: Path, name: str, found: Tensor | bytes, hashes: Mapping[str, str] | None) -> None:
    """Raises BuildError: it is not what was written."""
    if hashes is not None and hashes.get(name) != _hash(found):
        raise BuildError(
            f"{path} is damaged: '{name}' in it is not what was written; copy it again, or make it anew with `ingot "
            "calibrate`."
        )


def _about(text: str) -> dict[str, Any]:
    """Raises ValueError: what readers of scales rely on is of another kind."""
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ValueError("it does not say what it is about")
    for key, kind in ABOUT.items():
        if not isinstance(about.get(key, kind()), kind):
            raise ValueError(f"its {key} is {str(about[key])[:60]!r}")
    if "accuracy" in about:
        Accuracy.of(about["accuracy"])
    return about


def _sound(tensor: Tensor, above: float | None) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.numel() > 0
        and all_finite(tensor)
        and (above is None or bool((tensor > above).all()))
    )


def _tensors(quantised: Quantised) -> dict[str, Tensor]:
    """What a file holds of a weight; int4 as two in a byte, if they come out even."""
    packed = quantised.format.dtype == "int4" and quantised.values.shape[1] % 2 == 0
    found = {"values": _pack(quantised.values) if packed else quantised.values, "scale": quantised.scale}
    return found if quantised.zero is None else found | {"zero": quantised.zero}


def _read(path: Path, name: str) -> Quantised:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata()
            form, hashes = Format(**json.loads(header["formats"])[name]), _hashes(header)
            values, scale = file.get_tensor(f"values/{name}"), file.get_tensor(f"scale/{name}")
            zero = None if form.symmetric else file.get_tensor(f"zero/{name}")
    except (OSError, SafetensorError) as error:
        raise BuildError(f"the weight '{name}' cannot be read from {path} any longer ({error}).") from error
    for key, tensor in (("values", values), ("scale", scale), ("zero", zero)):
        if tensor is not None:
            _check(path, f"{key}/{name}", tensor, hashes)
    if form.dtype == "int4" and values.dtype == torch.uint8 and values.dim() == 2:
        values = _unpack(values)
    fits = values.dim() == 2 and values.dtype == (torch.int8 if form.integer else torch.float8_e4m3fn)
    fits = fits and _sound(scale, above=0) and scale.shape == form.scale_shape(*values.shape)
    if not fits or (zero is not None and (zero.dtype, zero.shape) != (torch.int8, scale.shape)):
        raise BuildError(
            f"the weight '{name}' in {path} is damaged: its numbers and scales are not those of {form.dtype} in that "
            "shape, or not finite; find it again with `ingot calibrate`."
        )
    return Quantised(form, values, scale, zero)


def _pack(values: Tensor) -> Tensor:
    """int8 numbers -8 .. 7 [N, K] -> uint8 [N, K / 2], the first of two in the lower half."""
    low, high = (values[:, ::2] & 15).to(torch.uint8), (values[:, 1::2] & 15).to(torch.uint8)
    return low | high << 4


def _unpack(packed: Tensor) -> Tensor:
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    return (both ^ 8).to(torch.int8) - 8
