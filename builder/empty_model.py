"""A transformers model without weights: parameters on the meta device, everything computed (RoPE tables, scales) real.

transformers itself loads this way: `_init_weights` recomputes every buffer that no checkpoint holds, so calling it on
the modules that have buffers is enough, for any model. Invariant: no parameter has storage, no buffer is left unset.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..engines.errors import BuildError
from . import hooks

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}  # of config.layer_types: what PagedAttention can express


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config` with ingot's hooks in place, in eval mode; `config` is left as it is.

    Raises BuildError if transformers has no decoder for the config, or the model is not built for attention functions.
    """
    check_decoder(config)
    hooks.install()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                deepcopy(config),
                dtype=dtype,
                attn_implementation=hooks.ATTENTION,
                experts_implementation=hooks.EXPERTS,
            ).eval()
    except KeyError as error:
        if hooks.ATTENTION not in str(error):
            raise
        kind = config.model_type
        raise BuildError(
            f"{kind} has attention code of its own that transformers does not let others replace"
        ) from error
    except (ValueError, NotImplementedError) as error:
        raise BuildError(f"{config.model_type} cannot be built: {first_line(error)}") from error
    _compute_buffers(model)
    pin_rope(model)
    hooks.describe_experts(model)
    return model


def check_decoder(config: PretrainedConfig) -> None:
    """Raises BuildError unless `config` is that of a text decoder which transformers can build."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise BuildError(f"{kind} is an encoder-decoder, but only decoders can be built")
    if config.get_text_config(decoder=True) is not config:
        raise BuildError(f"{kind} is a model of several modalities; save its language model alone and build that")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BuildError(f"{kind} has no causal language model in transformers, but only decoders can be built")
    unknown = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if unknown:
        raise BuildError(
            f"{kind} has {', '.join(sorted(unknown))} layers, but only full and sliding attention can be built"
        )


def _compute_buffers(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        buffers = {k: b for k, b in module.named_buffers(recurse=False) if b.is_meta}
        for key, buffer in buffers.items():
            poison = float("nan") if buffer.is_floating_point() else 0
            module._buffers[key] = torch.full_like(buffer, poison, device="cpu")
        if buffers:
            model._init_weights(module)
        unset = [k for k in buffers if k in module._non_persistent_buffers_set and module._buffers[k].isnan().any()]
        if unset:
            kind = model.config.model_type
            raise BuildError(f"{kind} does not say how its buffers {', '.join(unset)} of {name} are computed")


def pin_rope(model: nn.Module) -> None:
    """Fixes the RoPE tables that transformers chooses by the longest sequence in a batch.

    Requests would disturb each other. LongRoPE (arXiv:2402.13753) gets the table of the model's whole context: the
    long one, unless that context fits the original one. Dynamic NTK keeps the table of the model's context, which is
    what it uses up to that length.
    """
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)  # a name, or a name per layer type
        if isinstance(kinds, str) and _depends_on_length(kinds):
            _pin(module, kinds)
            setattr(module, "rope_type", "pinned")  # noqa: B010 (torch types attributes of modules as tensors)
        elif isinstance(kinds, dict):
            for layer_type in [name for name, kind in kinds.items() if _depends_on_length(kind)]:
                _pin(module, kinds[layer_type], layer_type)
                kinds[layer_type] = "pinned"


def _depends_on_length(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _pin(module: nn.Module, kind: str, layer_type: str | None = None) -> None:
    if kind != "longrope":
        return
    config: Any = module.config
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    original = parameters["original_max_position_embeddings"]
    length = original + 1 if config.max_position_embeddings > original else original
    options = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length, **options)
    getattr(module, f"{layer_type}_inv_freq" if layer_type else "inv_freq").copy_(inv_freq)


def first_line(error: BaseException) -> str:
    """The first line that says something, short enough for a message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:240]}" if lines else type(error).__name__
