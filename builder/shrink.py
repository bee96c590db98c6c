"""A small config of the same kind: what `gate.self_check` builds and compares.

Sizes go down; everything that decides what is computed stays: options, head size (RoPE tables depend on it), scalings,
the kinds of layers in their order, grouped heads or not, shared or separate sizes. Windows and softcaps become
small enough to take effect on the check's short random sequences. Invariant: the config given is left as it is.
"""

from copy import deepcopy
from typing import Any

from transformers import PretrainedConfig

WINDOW = 8  # tokens
SOFTCAP = 2.0
_HEADS, _EXPERTS, _CHOSEN, _INNER, _VOCAB, _MAX_LAYERS = 4, 6, 3, 96, 320, 12
_INNER_SIZES = (
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class, small enough to build and run in a second."""
    small = deepcopy(config)
    _shrink_layers(small)
    _shrink_heads(small)
    for name in _INNER_SIZES:
        _lower(small, name, _INNER)
    for name in _EXPERT_COUNTS:
        _lower(small, name, _EXPERTS)
    _lower(small, "num_experts_per_tok", _CHOSEN)
    for name in _WINDOWS:
        _lower(small, name, WINDOW)
    for name in config.to_dict():  # the usual 50 would not bend scores of the size that random weights give
        if "softcap" in name.replace("_", ""):
            _lower(small, name, SOFTCAP)
    _lower(small, "vocab_size", _VOCAB)
    for name in _TOKEN_IDS:  # embeddings have a padding index, which must be in the vocabulary
        token = getattr(small, name, None)
        if isinstance(token, int) and token >= small.vocab_size:
            setattr(small, name, 0)
    return small


def _shrink_layers(config: PretrainedConfig) -> None:
    """The first layers, as many as it takes to have seen every kind of layer, and at least two."""
    count = config.num_hidden_layers
    per_layer: dict[str, list[Any]] = {
        name: list(value)
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 1
    }
    kinds = [repr([value[layer] for value in per_layer.values()]) for layer in range(count)]
    keep = min(count, 2)
    while keep < min(count, _MAX_LAYERS) and len(set(kinds[:keep])) < len(set(kinds)):
        keep += 1
    for name, value in per_layer.items():
        setattr(config, name, value[:keep])
    config.num_hidden_layers = keep


def _shrink_heads(config: PretrainedConfig) -> None:
    """Fewer heads of the same size; multi-head, grouped and single-head stay what they are."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    irregular = heads * head_dim != config.hidden_size
    config.num_attention_heads = min(heads, _HEADS)
    if hasattr(config, "num_key_value_heads"):
        few = 1 if kv_heads == 1 else config.num_attention_heads if kv_heads == heads else 2
        config.num_key_value_heads = min(few, kv_heads)
    hidden = config.num_attention_heads * head_dim
    old = config.hidden_size
    config.hidden_size = min(old, hidden + 2 * config.num_attention_heads * 8 if irregular else hidden)
    if getattr(config, "word_embed_proj_dim", None) == old:  # OPT: no projection stays no projection
        config.word_embed_proj_dim = config.hidden_size


def _lower(config: PretrainedConfig, name: str, limit: float) -> None:
    value = getattr(config, name, None)
    if isinstance(value, (int, float)) and value > limit:
        setattr(config, name, limit)
