"""Small random configs, one per decoder family that must pass the whole path, and one per family that must be refused.

Each keeps what is peculiar to its family (window, softcap, sinks, partial or interleaved RoPE, q/k norm, tied head,
experts); sizes are small enough for a few milliseconds per forward pass. Windows are shorter than the prompts the
tests use, softcaps bend the logits of random weights, and `num_experts_per_tok` is smaller than the number of experts,
so that all are exercised. `shrink` leaves them as they are: the self-check and the build then export the same config.
"""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig

VOCAB = 304


def _small(class_name: str, **options: Any) -> PretrainedConfig:
    """Config of `class_name` with the usual small sizes; `options` overrides and adds."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return getattr(transformers, class_name)(**{**sizes, **options})


def _llama3_rope() -> PretrainedConfig:
    """A short original context, so that all three bands of the llama3 scaling occur."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return _small("LlamaConfig", rope_parameters=rope)


# gpt-oss' own YaRN settings, scaled down: 8 x 32 = the 256 positions of the small config
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _small("LlamaConfig"),
    "llama3_rope": _llama3_rope,
    "mistral": lambda: _small("MistralConfig", sliding_window=8, head_dim=16),
    "qwen2": lambda: _small("Qwen2Config", tie_word_embeddings=True),
    "qwen3": lambda: _small("Qwen3Config", head_dim=32),
    "gemma2": lambda: _small(
        "Gemma2Config",
        head_dim=32,
        sliding_window=8,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": lambda: _small(
        "Gemma3TextConfig", head_dim=32, sliding_window=8, query_pre_attn_scalar=24, num_hidden_layers=6
    ),
    "phi3": lambda: _small("Phi3Config", sliding_window=None),
    "olmo2": lambda: _small("Olmo2Config"),
    "granite": lambda: _small(
        "GraniteConfig",
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
    "cohere2": lambda: _small("Cohere2Config", sliding_window=8, num_hidden_layers=4, logit_scale=0.25),
    "glm4": lambda: _small("Glm4Config", head_dim=16),
    "starcoder2": lambda: _small("Starcoder2Config", sliding_window=8),
    "smollm3": lambda: _small("SmolLM3Config", num_hidden_layers=4),
    "gpt_neox": lambda: _small("GPTNeoXConfig"),
    "gpt2": lambda: _small("GPT2Config", n_positions=256),
    "opt": lambda: _small("OPTConfig", ffn_dim=96, word_embed_proj_dim=64),
    "mixtral": lambda: _small("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: _small(
        "Qwen3MoeConfig",
        head_dim=32,
        moe_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "gpt_oss": lambda: _small(
        "GptOssConfig",
        head_dim=16,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=_YARN,
    ),
}

REFUSED: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: _small("BloomConfig"),
    "gptj": lambda: _small("GPTJConfig", rotary_dim=8, n_positions=256),
    "falcon": lambda: _small("FalconConfig"),
    "mamba2": lambda: _small("Mamba2Config", num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=16),
    "llama4": lambda: _small(
        "Llama4TextConfig",
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        num_experts_per_tok=1,
        num_hidden_layers=4,
    ),
}
