"""What a head computes, as a torch module whose parameters are called as in published checkpoints.

The layers are transformers' own Llama, so export and passes meet nothing new; attention is whatever function the
config names: ingot's paged attention when the head is exported, an unrolled one when it is trained.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from ...engines.step import DRAFTED, FEATURES, HIDDEN, LOGITS
from ..hidden_states import EAGLE3


class Head(nn.Module):
    """An EAGLE-1 or EAGLE-3 head.

    kind: `EAGLE` or `EAGLE3`. features: columns of what it reads of the target at each token. draft_vocab_size: columns
    of its logits. bias: whether `fc` has one. Its graph has inputs `columns` besides a step's, and these `outputs`.
    """

    def __init__(
        self, config: LlamaConfig, kind: str, features: int, draft_vocab_size: int, bias: bool, attention: str
    ):
        super().__init__()
        config = deepcopy(config)
        config._attn_implementation = attention
        self.config = config
        self.kind, width, eps = kind, config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.lm_head = nn.Linear(width, draft_vocab_size, bias=False)
        self.columns, self.outputs = {FEATURES: features, DRAFTED: width}, (LOGITS, HIDDEN)
        if kind == EAGLE3:
            self.fc = nn.Linear(features, width, bias=bias)
            self.midlayer = MiddleLayer(config)
            self.norm = LlamaRMSNorm(width, eps)
        else:
            self.fc = nn.Linear(width + features, width, bias=bias)
            self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
            self.layers[0].input_layernorm = nn.Identity()

    def combine(self, features: Tensor) -> Tensor:
        """What the target thought, [.., features], as if the head itself had thought it: [.., width]."""
        return self.fc(features) if self.kind == EAGLE3 else features

    def advance(self, tokens: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """tokens, positions [B, T], each token one behind the position; hidden [B, T, width] -> [B, T, width]."""
        embeddings = self.embed_tokens(tokens)
        rope = self.rotary_emb(embeddings, positions)
        if self.kind == EAGLE3:
            return self.midlayer(embeddings, hidden, rope)
        x = self.fc(torch.cat((embeddings, hidden), -1))
        for layer in self.layers:
            x = layer(x, position_ids=positions, position_embeddings=rope)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., width] -> [.., draft_vocab_size]."""
        return self.lm_head(self.norm(hidden) if self.kind == EAGLE3 else hidden)

    def forward(
        self, tokens: Tensor, positions: Tensor, logit_rows: Tensor, features: Tensor, drafted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The exported function: [T], [T], [R], [T, features], [T, width] -> logits [R, vocab], hidden [R, width].

        Each row of `features` or `drafted` is zero: what a token follows is the target's state, or the head's own. For
        that, EAGLE-3 has no `fc`: a bias of it must have been taken off `drafted`, or be left out.
        """
        hidden = self.combine(features) + drafted
        x = self.advance(tokens[None], positions[None], hidden[None])[0][logit_rows]
        return self.logits(x), x


class MedusaHeads(nn.Module):
    """Medusa (arXiv:2401.10774): head i guesses, from the last hidden state at a token, the token i + 2 after it.

    It has no KV and sees no token but through the target's state. layers: residual blocks of each head.
    """

    def __init__(self, num_heads: int, num_layers: int, width: int, vocab_size: int, bias: bool):
        super().__init__()
        self.blocks = nn.ModuleList(_Blocks(num_layers, width, bias) for _ in range(num_heads))
        self.lm_heads = nn.ModuleList(nn.Linear(width, vocab_size, bias=False) for _ in range(num_heads))
        self.columns, self.outputs = {FEATURES: width}, (LOGITS,)

    def forward(self, tokens: Tensor, positions: Tensor, logit_rows: Tensor, features: Tensor) -> tuple[Tensor]:
        """As `Head`'s -> logits [R, num_heads * vocab_size]."""
        x = features[logit_rows]
        return (torch.cat([head(block(x)) for block, head in zip(self.blocks, self.lm_heads, strict=True)], -1),)


class _Blocks(nn.Module):
    def __init__(self, num: int, width: int, bias: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(num))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


class MiddleLayer(nn.Module):
    """EAGLE-3's only layer: attention reads embedding and hidden state side by side, each normalised on its own."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        layer = LlamaDecoderLayer(config, 0)
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = bool(getattr(config, "norm_before_residual", False))
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * old.in_features, old.out_features, bias=old.bias is not None))

    def forward(self, embeddings: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        both = torch.cat((self.input_layernorm(embeddings), normed), -1)
        x = residual + self.self_attn(both, position_embeddings=rope, attention_mask=None)[0]
        return x + self.mlp(self.post_attention_layernorm(x))
