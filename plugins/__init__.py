"""The ops an engine is made of: `ls plugins` is the list, `OPS` the table.

Each op is a folder: `schema.py` declares it (ONNX domain `ingot`), `reference.py` defines it in plain torch, which is
its CPU fallback and the oracle of every kernel. Nothing registers itself: call `register_schemas()` before the ONNX
checker or shape inference is to know the ops.

The table (`ops.py`) is loaded on first use: a GPU is served from this package without torch, onnx or Triton.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tactic import Site, Tactic

if TYPE_CHECKING:
    from .ops import OPS, Op, register_schemas

__all__ = ["OPS", "Op", "register_schemas", "tactics_of"]

# op type -> folder whose kernel.py has its `tactics`
_KERNELS = {
    "Add": "elementwise",
    "Cast": "elementwise",
    "Concat": "rows",
    "DequantizeLinear": "dequantise",
    "Div": "elementwise",
    "Draft": "draft",
    "DraftHead": "draft_head",
    "Experts": "experts",
    "GatedActivation": "gated_activation",
    "GatedLinear": "gated_linear",
    "GatedQuantisedLinear": "gated_quantised_linear",
    "Gather": "gather",
    "Gelu": "elementwise",
    "Grow": "grow",
    "Identity": "elementwise",
    "LayerNormalization": "reduce",
    "KeepStates": "rows",
    "Linear": "linear",
    "MoveRows": "rows",
    "Mul": "elementwise",
    "Neg": "elementwise",
    "PagedAttention": "paged_attention",
    "QuantiseTokens": "quantise_tokens",
    "QuantisedGatedActivation": "quantised_gated_activation",
    "QuantisedLinear": "quantised_linear",
    "QuantisedRMSNorm": "quantised_rms_norm",
    "QuantizeLinear": "quantise_tokens",
    "RMSNorm": "rms_norm",
    "ReadStates": "rows",
    "ReduceSum": "reduce",
    "Relu": "elementwise",
    "Rope": "rope",
    "RotaryCosSin": "rotary_cos_sin",
    "RotaryPagedAttention": "rotary_paged_attention",
    "Sample": "sample",
    "Sigmoid": "elementwise",
    "Softmax": "reduce",
    "Sqrt": "elementwise",
    "Sub": "elementwise",
    "Tanh": "elementwise",
    "TopK": "reduce",
    "Unpack": "unpack",
}


def tactics_of(op_type: str) -> Callable[[Site], list[Tactic]] | None:
    """`tactics` of an op's GPU kernels, or None where it has none. Imports triton."""
    folder = _KERNELS.get(op_type)
    return None if folder is None else import_module(f".{folder}.kernel", __package__).tactics


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".ops", __package__), name)
