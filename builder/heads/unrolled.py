"""Attention over several drafting steps at once, for training ("training-time test" of EAGLE-3, arXiv:2503.01840).

In step k the head stands at s + k for every anchor s, has the target's states up to s, and its own after that. So its
query sees the keys of step 0 up to s, and those of the later steps for the same anchor: one more score a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "ingot_unrolled"


def install() -> None:
    """Makes it known to transformers; a second call changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, unrolled)


def begin(head: nn.Module) -> None:
    """Forgets the steps so far."""
    for module in head.modules():
        if hasattr(module, "q_proj"):
            module.steps = []  # type: ignore[assignment]


def unrolled(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """The next step: query [B, H, S, D], key and value [B, Hkv, S, D], by anchor -> [B, S, H, D]."""
    groups = query.shape[1] // key.shape[1]
    module.steps.append((key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    (first, values), *later = module.steps
    length = query.shape[2]
    ahead = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ first.transpose(2, 3) * scaling).masked_fill(ahead, -torch.inf)
    own = [(query * k).sum(-1, keepdim=True) * scaling for k, _ in later]
    weights = torch.cat((scores, *own), -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    y = weights[..., :length] @ values
    for i, (_, v) in enumerate(later):
        y = y + weights[..., length + i, None] * v
    return y.transpose(1, 2), None
