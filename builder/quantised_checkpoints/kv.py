"""Scales of the KV cache that a checkpoint holds, by pool of the engine's graph.

compressed-tensors stores `self_attn.k_scale` and `self_attn.v_scale`, before 0.12 `k_proj.output_scale` and
`v_proj.output_scale`; ModelOpt stores `k_proj.k_scale` and `v_proj.v_scale`. One for a layer, or one for each KV head.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...engines import step
from ...engines.errors import BuildError
from .stored import Parts

_LAYER = re.compile(r"\.(\d+)\.")
SUFFIXES = "k_scale", "v_scale", "output_scale"


@dataclass(frozen=True)
class KVScales:
    """`k_pages.i` and `v_pages.i` -> the scale of their numbers, [1] or [kv_heads] float32."""

    dtype: str  # "fp8_e4m3" or "int8"
    scales: Mapping[str, Tensor]


def read_kv(path: Path, dtype: str | None, modules: Mapping[str, Parts], layers: int, kv_heads: int) -> KVScales | None:
    """The scales of all layers; None where the checkpoint leaves the cache as it is.

    Raises BuildError: scales of some layers only, none at all, or of another shape.
    """
    if dtype is None:
        return None
    found: dict[str, Tensor] = {}
    for name, parts in modules.items():
        layer = _LAYER.search(f".{name}.")
        for suffix in SUFFIXES:
            if layer and suffix in parts.tensors and (kind := _kind(name, suffix)):
                heads = kv_heads if parts.tensors[suffix].shape and _numel(parts, suffix) == kv_heads else 1
                pool = (step.k_pages if kind == "k" else step.v_pages)(int(layer[1]))
                found[pool] = parts.scale(suffix, (heads,))()
                if not bool((found[pool] > 0).all()):
                    raise BuildError(
                        f"{path} stores 0 as '{name}.{suffix}', expected a scale above it; calibrate it again"
                    )
    wanted = [pool(layer) for layer in range(layers) for pool in (step.k_pages, step.v_pages)]
    if missing := [pool for pool in wanted if pool not in found]:
        raise BuildError(
            f"{path} says that its KV cache is in {dtype}, but stores no scale for {missing[0]} "
            f"({len(missing)} of {len(wanted)} are missing); calibrate it again with the KV cache, or take the KV "
            "cache out of its quantisation config to have it served in the activation dtype"
        )
    return KVScales(dtype, {pool: found[pool] for pool in wanted})


def _kind(name: str, suffix: str) -> str | None:
    """k or v; None for the output of something else."""
    if suffix != "output_scale":
        return suffix[0]
    last = name.rpartition(".")[2]
    return last[0] if last in ("k_proj", "v_proj") else None


def _numel(parts: Parts, suffix: str) -> int:
    numel = 1
    for size in parts.tensors[suffix].shape:
        numel *= size
    return numel
