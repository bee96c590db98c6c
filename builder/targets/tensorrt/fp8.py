"""Where TensorRT has FP8: it compiles no graph with FP8 in it for a GPU that has no FP8 of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ....calibration.recipe import KV_CACHES, Recipe
from ....engines.errors import BuildError

if TYPE_CHECKING:
    from ... import BuildConfig

OLDEST = 89  # compute capability 8.9
FP8 = "fp8_e4m3"


def asks_for_fp8(config: BuildConfig) -> bool:
    """Whether the recipe or the KV cache that is asked for is in FP8; a checkpoint may be, too (`has_fp8`)."""
    recipe = Recipe.open(config.quant) if config.quant else None
    pages = KV_CACHES.get(config.kv_cache) or (recipe.kv_cache if recipe else None)
    rules = recipe.rules if recipe else ()
    formats = [form for rule in rules for form in (rule.format, rule.activation) if form]
    return any(form.dtype == FP8 for form in formats) or bool(pages and pages.dtype == FP8)


def has_fp8(model: ir.Model) -> bool:
    """Whether a graph holds or computes numbers in FP8."""
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.inputs if value is not None))
    return any(value.dtype == ir.DataType.FLOAT8E4M3FN for value in values)


def check_fp8(capability: int) -> None:
    """Raises BuildError: the GPU has none."""
    if capability < OLDEST:
        raise BuildError(
            f"TensorRT has FP8 from compute capability 89 on, and this engine is for {capability}; build with "
            "`--quant int8-sq`, `w8a16` or `int4-gptq` and `--kv-cache int8`, or for `--target cuda`."
        )
