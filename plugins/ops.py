"""The table of ops: schemas and definitions. It needs onnx and torch, which replaying a plan does not."""

from __future__ import annotations

from typing import NamedTuple

import onnx.defs

from . import (
    experts,
    gated_activation,
    gated_linear,
    gated_quantised_linear,
    linear,
    paged_attention,
    quantise_tokens,
    quantised_gated_activation,
    quantised_linear,
    quantised_rms_norm,
    rms_norm,
    rope,
    rotary_cos_sin,
    rotary_paged_attention,
)
from .binder import Run


class Op(NamedTuple):
    """What an op is: its ONNX schema and its definition `reference(*inputs, **attributes)`."""

    schema: onnx.defs.OpSchema
    reference: Run


OPS: dict[str, Op] = {
    "Experts": Op(experts.SCHEMA, experts.experts),
    "GatedActivation": Op(gated_activation.SCHEMA, gated_activation.gated_activation),
    "GatedLinear": Op(gated_linear.SCHEMA, gated_linear.gated_linear),
    "GatedQuantisedLinear": Op(gated_quantised_linear.SCHEMA, gated_quantised_linear.gated_quantised_linear),
    "Linear": Op(linear.SCHEMA, linear.linear),
    "PagedAttention": Op(paged_attention.SCHEMA, paged_attention.paged_attention),
    "QuantiseTokens": Op(quantise_tokens.SCHEMA, quantise_tokens.quantise_tokens),
    "QuantisedGatedActivation": Op(
        quantised_gated_activation.SCHEMA, quantised_gated_activation.quantised_gated_activation
    ),
    "QuantisedLinear": Op(quantised_linear.SCHEMA, quantised_linear.quantised_linear),
    "QuantisedRMSNorm": Op(quantised_rms_norm.SCHEMA, quantised_rms_norm.quantised_rms_norm),
    "RMSNorm": Op(rms_norm.SCHEMA, rms_norm.rms_norm),
    "Rope": Op(rope.SCHEMA, rope.rope),
    "RotaryCosSin": Op(rotary_cos_sin.SCHEMA, rotary_cos_sin.rotary_cos_sin),
    "RotaryPagedAttention": Op(rotary_paged_attention.SCHEMA, rotary_paged_attention.rotary_paged_attention),
}


def register_schemas() -> None:
    """Makes the ops known to `onnx.checker` and `onnx.shape_inference` in this process; a second call does nothing."""
    for name, op in OPS.items():
        if not onnx.defs.has(name, op.schema.domain):
            onnx.defs.register_schema(op.schema)
