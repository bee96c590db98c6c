"""NVIDIA ModelOpt's FP8 (E4M3): one scale for a tensor and one for what it multiplies, or a scale for each row.

`FP8`: `weight` [N, K], `weight_scale` [], `input_scale` []. `FP8_PER_CHANNEL_PER_TOKEN`: `weight_scale` [N], and
activations with a scale for each token. The description is `hf_quant_config.json`, or since 2025 also in config.json.
Source: github.com/NVIDIA/TensorRT-Model-Optimizer (modelopt/torch/export).
"""

from collections.abc import Mapping
from typing import Any

from ...calibration.formats import Format
from ...engines.errors import BuildError
from .fp8 import is_fp8, weight_of
from .stored import Parts, StoredModule

# name -> rows of the weight that share a scale (0: all), whether activations are static
ALGORITHMS = {"FP8": (0, True), "FP8_PER_CHANNEL_PER_TOKEN": (1, False)}


def read(config: Mapping[str, Any], modules: Mapping[str, Parts]) -> dict[str, StoredModule]:
    """The quantised modules by name. Raises BuildError: an algorithm that is not served, a tensor that does not fit."""
    algorithm = details(config).get("quant_algo")
    if algorithm is None and details(config).get("kv_cache_quant_algo"):
        return {}  # nothing but the KV cache
    if algorithm not in ALGORITHMS:
        raise BuildError(
            f"the checkpoint was quantised by ModelOpt with {algorithm}, expected {' or '.join(ALGORITHMS)}; give one "
            "in those, or the unquantised one"
        )
    rows, static = ALGORITHMS[algorithm]
    return {name: _module(rows, static, parts) for name, parts in modules.items() if is_fp8(parts)}


def details(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that says how: hf_quant_config.json has it under `quantization`, config.json flat."""
    return config.get("quantization") or config


def kv_dtype(config: Mapping[str, Any]) -> str | None:
    """Numbers of the KV cache; None: as they are. Raises BuildError for those that are not served."""
    found = details(config)
    algorithm, scheme = found.get("kv_cache_quant_algo"), found.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        algorithm = "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else str(dict(scheme))
    elif scheme:
        algorithm = scheme
    if algorithm not in (None, "FP8"):
        raise BuildError(
            f"the checkpoint has a KV cache in {algorithm}, expected FP8; give one without it, or take it out of the "
            "checkpoint's quantisation config"
        )
    return None if algorithm is None else "fp8_e4m3"


def _module(rows: int, static: bool, parts: Parts) -> StoredModule:
    parts.only("weight", "weight_scale", "input_scale")
    shape = parts.shape("weight")
    form = Format("fp8_e4m3", rows=rows)
    return StoredModule(
        parts.name, shape, form, weight_of(parts, shape), parts.scale("weight_scale", form.scale_shape(*shape)),
        activation=Format("fp8_e4m3", rows=0 if static else 1),
        input_scale=parts.number("input_scale") if static else None,
    )  # fmt: skip
