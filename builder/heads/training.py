"""An EAGLE-3 head for a target, trained on text by what the target says of it (arXiv:2503.01840).

Cross-entropy against the target's own distribution over several drafting steps (`unrolled.py`), earlier ones counting
more. A later step learns from the states of an earlier one, so the number of steps grows in the first third of the
training. What is alike in head and target begins as the target's: output head, final norm, last layer. On a GPU no step
waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from . import unrolled
from .module import Head

DECAY, WARM_UP, GROWTH = (
    0.01,
    0.03,
    0.33,
)  # of weights; shares of the training: the rate rises, drafting steps are added
LATER = 0.8  # what a drafting step counts of the one before


@dataclass(frozen=True)
class Agreement:
    """by_step: share of held-out tokens whose likeliest successor the head names, given the text so far, in each
    drafting step. mean_length: tokens of a verification that this makes, where all steps before have to agree."""

    by_step: tuple[float, ...]
    mean_length: float


class Trainer:
    """Head, target and optimiser. Windows are token ids [B, W]."""

    def __init__(
        self, target: PreTrainedModel, head: Head, reads: Sequence[int], ids: Tensor, steps: int, learning_rate: float,
        all_at_once: bool = False,
    ):  # fmt: skip
        """reads: hidden states of the target. ids [draft vocabulary]: tokens that the head's logits are of.

        all_at_once: all drafting steps are learnt from the beginning, since the head knows something already.
        """
        self.target, self.head, self._reads, self._ids, self.steps = target, head, tuple(reads), ids, steps
        self._rate, self._all_at_once = learning_rate, all_at_once
        self._known = torch.zeros(head.embed_tokens.num_embeddings, dtype=torch.bool, device=ids.device)
        self._known[ids] = True
        head.embed_tokens.requires_grad_(False)
        self._every = len(ids) == len(self._known)
        self._trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in self._trained if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in self._trained if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=ids.is_cuda)

    def learn(self, window: Tensor, progress: float) -> Tensor:
        """A step of training at `progress` (0 to 1) -> its loss [], in nats a token."""
        for group in self.optimiser.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
            group["lr"] = self._rate * min(1.0, 0.05 + progress / WARM_UP) * (0.01 + 0.99 * cosine)
        with self._autocast(window):
            steps = self.steps if self._all_at_once else min(self.steps, 1 + int(progress / GROWTH * (self.steps - 1)))
            loss = self._loss(window, steps)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self.optimiser.step()
        return loss.detach()

    @torch.no_grad()
    def agreement(self, windows: Sequence[Tensor], begin: int = 0) -> Agreement:
        """begin: the place in a window from which drafts count."""
        right, length, num = [0] * self.steps, 0, 0
        for window in windows:
            with self._autocast(window):
                features, logits = self._teach(window)
                so_far = torch.ones((), dtype=torch.bool, device=window.device)
                for k, guess in self._unroll(window, features, self.steps):
                    told = logits[:, k + 1 : k + 1 + guess.shape[1]].argmax(-1)
                    same = (self._ids[guess.argmax(-1)] == told)[:, begin:]
                    so_far = so_far & same
                    right[k] += int(same.sum())
                    length += int(so_far.sum())
            num += same.numel()
        return Agreement(tuple(n / num for n in right), 1 + length / num)

    def _loss(self, window: Tensor, steps: int) -> Tensor:
        features, logits = self._teach(window)
        can = self._known[logits.argmax(-1)]  # what it cannot say, it does not learn from
        wanted = (logits if self._every else logits[..., self._ids]).float().softmax(-1)  # [B, W, draft vocabulary]
        total, weight = torch.zeros((), device=window.device), 0.0
        for k, guess in self._unroll(window, features, steps):
            of = slice(k + 1, k + 1 + guess.shape[1])
            each = -(wanted[:, of] * guess.float().log_softmax(-1)).sum(-1)
            total = total + LATER**k * (each * can[:, of]).sum() / can[:, of].sum().clamp(min=1)
            weight += LATER**k
        return total / weight

    @torch.no_grad()
    def _teach(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads [B, W, features], and the target's logits [B, W, vocab]."""
        output = self.target(input_ids=window, use_cache=False, output_hidden_states=True)
        return torch.cat([output.hidden_states[i] for i in self._reads], -1), output.logits

    def _unroll(self, window: Tensor, features: Tensor, steps: int) -> Iterator[tuple[int, Tensor]]:
        """(drafting step k, its logits [B, A, draft vocabulary]) by anchor: of what follows token anchor + k + 1."""
        unrolled.begin(self.head)
        num = window.shape[1] - self.steps
        positions = torch.arange(num, device=window.device)[None]
        hidden = self.head.combine(features[:, :num])
        for k in range(steps):
            hidden = self.head.advance(window[:, k + 1 : k + 1 + num], positions + k, hidden)
            yield k, self.head.logits(hidden)

    @staticmethod
    def _autocast(window: Tensor) -> torch.autocast:
        kind = window.device.type
        fast = kind != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.autocast(kind, torch.bfloat16, enabled=fast)


def head_config(
    target: PreTrainedModel, draft_vocab_size: int, reads: Sequence[int], mlp_width: int = 0
) -> LlamaConfig:
    """A Llama layer of the target's sizes, but for `mlp_width` if that is given, which reads these hidden states."""
    config: Any = target.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    rope = getattr(config, "rope_parameters", None) or {}
    return LlamaConfig(**dict(
        architectures=["LlamaForCausalLMEagle3"], bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
        vocab_size=config.vocab_size, draft_vocab_size=draft_vocab_size,
        hidden_size=width, intermediate_size=mlp_width or getattr(config, "intermediate_size", None) or 4 * width,
        eagle_aux_hidden_state_layer_ids=list(reads),
        num_hidden_layers=1, num_attention_heads=heads, head_dim=getattr(config, "head_dim", None) or width // heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        max_position_embeddings=config.max_position_embeddings, rms_norm_eps=getattr(config, "rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": rope.get("rope_theta", 1e4)},
        tie_word_embeddings=False, dtype=target.dtype,
    ))  # fmt: skip


@torch.no_grad()
def initialise(head: Head, target: PreTrainedModel, ids: Tensor) -> None:
    """What is alike begins as the target's, the rest as small random numbers."""
    decoder: Any = target.get_decoder()
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    inputs, outputs = target.get_input_embeddings(), target.get_output_embeddings()
    head.embed_tokens.weight.copy_(inputs.weight)  # type: ignore[arg-type]
    head.lm_head.weight.copy_(outputs.weight[ids])
    width = head.embed_tokens.embedding_dim
    head.fc.weight[:, -width:] += torch.eye(width, device=head.fc.weight.device)
    _copy(head.norm.weight, getattr(getattr(decoder, "norm", None), "weight", None))
    last = dict(decoder.layers[-1].named_parameters()) if hasattr(decoder, "layers") else {}
    for name, parameter in head.midlayer.named_parameters():
        _copy(parameter, last.get(name.replace("hidden_norm", "input_layernorm")))


def _copy(parameter: Tensor, like: Tensor | None) -> None:
    """As it is, or into the last part: that reads the hidden state, or is of a wider MLP."""
    if like is None or like.dim() != parameter.dim():
        return
    if any(a > b for a, b in zip(like.shape, parameter.shape, strict=True)):
        return
    parameter[tuple(slice(-size, None) for size in like.shape)] = like
