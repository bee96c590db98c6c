"""Where ingot enters a transformers model: its attention and experts functions become single graph nodes.

transformers looks both functions up by name in a table (`AttentionInterface`, `ExpertsInterface`), so a decoder is
exported without code of its own. Each hook emits one symbolic ONNX node and nothing else.
Invariant: what a node cannot express (a mask, a position bias, an unknown activation) raises BuildError, never drops.
"""

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..engines.errors import BuildError
from ..plugins.gated_activation.reference import activation_function

ATTENTION = "ingot_paged_attention"  # no mask function goes with it: transformers then builds no mask at all
EXPERTS = "ingot_experts"
_EXPERTS_ATTRIBUTES = "ingot_experts_attributes"


def install() -> None:
    """Makes both functions known to transformers; a second call changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, H, Dv], as transformers' attention
    functions do. The node is 2-D; the exporter adds its step inputs and its layer number.

    Raises BuildError for attention that is not causal or has a mask or bias of its own.
    """
    name = type(module).__name__
    if attention_mask is not None or position_bias is not None:
        what = "mask" if position_bias is None else "position bias"
        raise BuildError(f"{name} adds a {what} of its own to the scores, which PagedAttention cannot express")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise BuildError(f"{name} attends in both directions, but only causal decoders can be built")
    if query.dim() != 4 or query.shape[0] != 1:
        raise BuildError(f"{name} hands over a query of shape {tuple(query.shape)}, expected [1, heads, tokens, dim]")
    num_tokens, num_heads, v_head_dim = query.shape[2], query.shape[1], value.shape[3]
    y = torch.onnx.ops.symbolic(
        "ingot::PagedAttention",
        [_flat(query), _flat(key), _flat(value), s_aux],
        {
            "num_heads": num_heads,
            "num_kv_heads": key.shape[1],
            "head_dim": query.shape[3],
            "v_head_dim": v_head_dim,
            "scale": float(query.shape[3] ** -0.5 if scaling is None else scaling),
            "window": int(sliding_window or 0),
            "softcap": float(softcap or 0.0),
        },
        dtype=query.dtype,
        shape=(num_tokens, num_heads * v_head_dim),
        version=1,
    )
    return y.reshape(1, num_tokens, num_heads, v_head_dim), None


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[2], x.shape[1] * x.shape[3])  # [1, H, T, D] -> [T, H*D]


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, K], top_k_index and top_k_weights [T, k] -> [T, K] as one `ingot::Experts` node."""
    weights = [module.gate_up_proj, module.down_proj]
    biases = [getattr(module, "gate_up_proj_bias", None), getattr(module, "down_proj_bias", None)]
    return torch.onnx.ops.symbolic(
        "ingot::Experts",
        [hidden_states, top_k_index, top_k_weights, *weights, *biases],
        getattr(module, _EXPERTS_ATTRIBUTES),
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=1,
    )


def describe_experts(model: nn.Module) -> None:
    """Finds out, for each experts module, what its gate computes, and keeps that on the module for `experts`.

    The gate is probed with random numbers against the activations that `Experts` knows: a module is recognised by what
    it does, not by its class. Raises BuildError if it does something else.
    """
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "_apply_gate"):
            setattr(module, _EXPERTS_ATTRIBUTES, _experts_attributes(name, module))


def _experts_attributes(name: str, module: Any) -> dict[str, Any]:
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):  # not in transformers 5.17
        what = "no gate" if not module.has_gate else "a norm after each expert"
        raise BuildError(f"the experts {name} ({type(module).__name__}) have {what}, which Experts cannot express")
    interleaved = not module.is_concatenated
    alpha, limit = float(getattr(module, "alpha", 1.702)), float(getattr(module, "limit", 7.0))
    x = 4 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    expected = module._apply_gate(x)
    gate, up = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, -1)
    clamped = gate.clamp(max=limit)
    candidates = {n: activation_function(n)(gate) * up for n in ("silu", "gelu", "gelu_tanh", "relu")}
    candidates["swiglu_oai"] = (up.clamp(-limit, limit) + 1) * clamped * torch.sigmoid(alpha * clamped)
    for activation, candidate in candidates.items():
        if candidate.shape == expected.shape and torch.allclose(candidate, expected, rtol=1e-5, atol=1e-5):
            return {
                "activation": activation,
                "transposed": int(module.is_transposed),
                "interleaved": int(interleaved),
                "alpha": alpha,
                "limit": limit,
            }
    known = ", ".join(candidates)
    raise BuildError(f"the gate of the experts {name} ({type(module).__name__}) computes none of {known}")
