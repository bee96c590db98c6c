"""The ops an engine is made of: `ls plugins` is the list, `OPS` the table.

Each op is a folder: `schema.py` declares it (ONNX domain `ingot`), `reference.py` defines it in plain torch, which is
its CPU fallback and the oracle of every kernel. Nothing registers itself: call `register_schemas()` before the ONNX
checker or shape inference is to know the ops.
"""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import onnx.defs

from . import experts, gated_activation, linear, paged_attention, rms_norm, rope, rotary_cos_sin
from .binder import Run
from .tactic import Site, Tactic


class Op(NamedTuple):
    """What an op is: its ONNX schema and its definition `reference(*inputs, **attributes)`."""

    schema: onnx.defs.OpSchema
    reference: Run


OPS: dict[str, Op] = {
    "Experts": Op(experts.SCHEMA, experts.experts),
    "GatedActivation": Op(gated_activation.SCHEMA, gated_activation.gated_activation),
    "Linear": Op(linear.SCHEMA, linear.linear),
    "PagedAttention": Op(paged_attention.SCHEMA, paged_attention.paged_attention),
    "RMSNorm": Op(rms_norm.SCHEMA, rms_norm.rms_norm),
    "Rope": Op(rope.SCHEMA, rope.rope),
    "RotaryCosSin": Op(rotary_cos_sin.SCHEMA, rotary_cos_sin.rotary_cos_sin),
}


# op type -> folder whose kernel.py has its `tactics`
_KERNELS = {
    "Add": "elementwise",
    "Cast": "elementwise",
    "Div": "elementwise",
    "Experts": "experts",
    "GatedActivation": "gated_activation",
    "Gather": "gather",
    "Gelu": "elementwise",
    "Identity": "elementwise",
    "LayerNormalization": "reduce",
    "Linear": "linear",
    "Mul": "elementwise",
    "Neg": "elementwise",
    "PagedAttention": "paged_attention",
    "RMSNorm": "rms_norm",
    "ReduceSum": "reduce",
    "Relu": "elementwise",
    "Rope": "rope",
    "RotaryCosSin": "rotary_cos_sin",
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


def register_schemas() -> None:
    """Makes the ops known to `onnx.checker` and `onnx.shape_inference` in this process; a second call does nothing."""
    for name, op in OPS.items():
        if not onnx.defs.has(name, op.schema.domain):
            onnx.defs.register_schema(op.schema)
