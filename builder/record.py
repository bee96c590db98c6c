"""What the manifest says of a build, read off the graph and the checkpoint rather than kept along the way."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..engines.dtypes import ACTIVATION_DTYPES, DTYPES
from ..engines.errors import BuildError
from ..engines.manifest import BuildRecord, KVLayer, ModelInfo
from ..engines.step import LOGITS, k_pages
from .text_files import generation_config

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PretrainedConfig

    from . import Phases
    from .checkpoint import Checkpoint

VERSIONED = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def kv_layers(model: ir.Model) -> tuple[KVLayer, ...]:
    """The KV pool of each attention layer, in layer order, as its node and the graph's inputs declare it."""
    types = {value.name: value.dtype for value in model.graph.inputs}
    nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
    nodes.sort(key=lambda node: node.attributes["layer"].as_int())
    return tuple(
        KVLayer(
            kv_heads=node.attributes["num_kv_heads"].as_int(),
            head_dim=node.attributes["head_dim"].as_int(),
            v_head_dim=node.attributes["v_head_dim"].as_int(),
            window=node.attributes["window"].as_int() if "window" in node.attributes else 0,
            dtype=next(d.name for d in DTYPES.values() if d.onnx == types[k_pages(layer)]),
        )
        for layer, node in enumerate(nodes)
    )


def activation_dtype(asked: str, config: PretrainedConfig) -> str:
    """The dtype of weights and activations: the one asked for, or with `auto` the checkpoint's.

    Raises BuildError for one that engines do not come in.
    """
    dtype = str(config.get_text_config().dtype or "float32").removeprefix("torch.") if asked == "auto" else asked
    if dtype not in ACTIVATION_DTYPES:
        raise BuildError(f"the dtype is {dtype}, expected one of {', '.join(ACTIVATION_DTYPES)}; pass one as --dtype.")
    return dtype


def model_info(source: str, checkpoint: Checkpoint, model: ir.Model, dtype: str) -> ModelInfo:
    """The model as it was cast; `source` is what the user called it."""
    config = checkpoint.config.get_text_config()
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    vocab = logits.shape[-1] if logits.shape is not None else None
    if not isinstance(vocab, int):
        raise BuildError(f"the graph's logits have the shape {logits.shape}, expected a fixed vocabulary last.")
    return ModelInfo(
        source=source,
        architecture=(checkpoint.config.architectures or [type(config).__name__])[0],
        model_type=config.model_type,
        num_parameters=sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None),
        dtype=dtype,
        vocab_size=vocab,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        max_model_len=config.max_position_embeddings,
        eos_token_ids=end_tokens(checkpoint),
        bos_token_id=config.bos_token_id,
    )


def end_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids of the tokens that end a text. Raises BuildError: something else, which no token would ever equal."""
    found = generation_config(checkpoint.path).get("eos_token_id", checkpoint.config.get_text_config().eos_token_id)
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int for token in ids):
        raise BuildError(
            f"the eos_token_id of {checkpoint.path} is {found!r}, expected the id of a token or a list of ids; mend it "
            "in generation_config.json, or in config.json where that says nothing of it."
        )
    return tuple(ids)


def build_record(
    phase: Phases, error: float, num_exported: int, graph: ir.Model, options: dict[str, Any]
) -> BuildRecord:
    """Of a build that ends now."""
    return BuildRecord(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - phase.begun, 3),
        phases=phase.seconds,
        num_nodes={"exported": num_exported, "optimised": graph.graph.num_nodes()},
        self_check_error=error,
        versions=versions(),
        options=options,
    )


def versions() -> dict[str, str]:
    """Versions of the packages that shaped the graph."""
    return {name: version(name) for name in VERSIONED}
