"""FP8 (E4M3) as transformers' FineGrainedFP8 and DeepSeek store it, and the older form with one scale for a tensor.

`weight` [N, K] float8_e4m3fn with `weight_scale_inv` [ceil(N / 128), ceil(K / 128)], by which it is multiplied despite
its name; activations get a scale for 128 columns of each token. Without `weight_block_size` there is one scale for all
(also called `weight_scale`) and, if `activation_scheme` is static, one for what the product reads.
Source: github.com/huggingface/transformers (integrations/finegrained_fp8.py), arXiv:2412.19437 section 3.3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...calibration.formats import Format
from ...engines.errors import BuildError
from .stored import FLOATS, Parts, Read, StoredModule

WEIGHT_SCALES = "weight_scale_inv", "weight_scale"
INPUT_SCALES = "activation_scale", "input_scale"


def read(config: Mapping[str, Any], modules: Mapping[str, Parts]) -> dict[str, StoredModule]:
    """The quantised modules by name. Raises BuildError: an option that is not served, a tensor that does not fit."""
    scheme = config.get("activation_scheme", "dynamic")
    for option, found, expected in (
        ("fmt", config.get("fmt", "e4m3"), ("e4m3",)),
        ("expert_dtype", config.get("expert_dtype", "fp8"), ("fp8",)),
        ("activation_scheme", scheme, ("dynamic", "static")),
        ("scale_fmt", config.get("scale_fmt") or "float", ("float", "ue8m0")),
    ):
        if found not in expected:
            raise BuildError(
                f"the checkpoint is FP8 with {option} {found}, expected {' or '.join(expected)}; give one in that form"
            )
    block = config.get("weight_block_size")
    if block and scheme == "static":
        raise BuildError(
            "the checkpoint is FP8 in blocks with activation_scheme static, expected dynamic; give one in that form"
        )
    return {name: _module(block, scheme == "static", parts) for name, parts in modules.items() if is_fp8(parts)}


def is_fp8(parts: Parts) -> bool:
    """Whether the module's weight is in FP8."""
    weight = parts.tensors.get("weight")
    return weight is not None and weight.dtype.name == "float8_e4m3fn"


def weight_of(parts: Parts, shape: tuple[int, int]) -> Read:
    """The numbers [N, K]; BuildError when they are read and one is NaN."""
    stored = parts.need("weight", shape, ["float8_e4m3fn"])

    def read() -> Tensor:
        numbers = stored()
        if bool((numbers.view(torch.uint8) & 127 == 127).any()):
            raise BuildError(f"{parts.path} stores NaN in '{parts.name}.weight'; download the checkpoint again")
        return numbers

    return read


def _module(block: list[int] | None, static: bool, parts: Parts) -> StoredModule:
    parts.only("weight", *WEIGHT_SCALES, *INPUT_SCALES)
    shape = parts.shape("weight")
    rows, group = block or (0, 0)
    form = Format("fp8_e4m3", rows=rows, group=group)
    name = _either(parts, WEIGHT_SCALES)
    scale = parts.scale(name, form.scale_shape(*shape), [*FLOATS, "float8_e8m0fnu", "uint8"])
    activation = Format("fp8_e4m3", rows=0 if static else 1, group=group)
    return StoredModule(
        parts.name, shape, form, weight_of(parts, shape), scale, activation=activation,
        input_scale=parts.number(_either(parts, INPUT_SCALES)) if static else None,
    )  # fmt: skip


def _either(parts: Parts, suffixes: tuple[str, str]) -> str:
    return next((suffix for suffix in suffixes if suffix in parts.tensors), suffixes[0])
