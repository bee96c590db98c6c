"""The gate lets right models through and stops wrong ones, each kind of wrongness with its reason.

The other families of tests/families.py go through the gate in tests/test_families.py, which builds an engine of each.
"""

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES, REFUSED
from ingot.builder.export import export
from ingot.builder.gate import check_structure, self_check
from ingot.builder.shrink import shrink
from ingot.engines.errors import BuildError
from transformers import AutoConfig, LlamaConfig


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt_oss"])
def test_right_models_pass(family):
    assert self_check(FAMILIES[family]()) < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family):
    config = REFUSED[family]()
    with pytest.raises(BuildError) as error:
        self_check(config)
    message = str(error.value)
    assert config.model_type in message and "attention" in message and "\n" not in message


def wrong(op_type, **changes):
    """A pass that sets attributes of some nodes: what a broken hook or rewrite would do."""

    def damage(model):
        found = [node for node in model.graph if node.op_type == op_type]
        assert found
        for node in found:
            for name, value in changes.items():
                node.attributes[name] = ir.Attr(name, _kind(value), value)
        return model

    return damage


def _kind(value):
    return ir.AttributeType.INT if isinstance(value, int) else ir.AttributeType.FLOAT


@pytest.mark.parametrize(
    "damage",
    [wrong("PagedAttention", window=0), wrong("PagedAttention", window=7), wrong("PagedAttention", softcap=0.0)],
    ids=["no window", "window off by one", "no softcap"],
)
def test_wrong_attention_is_found(damage):
    with pytest.raises(BuildError, match="gemma2 computes other logits .* position"):
        self_check(FAMILIES["gemma2"](), damage)


def test_position_from_the_batch_is_found():
    """A model that counts positions itself instead of taking them (as BART does) is right only for one sequence."""

    def count(model):
        positions = next(value for value in model.graph.inputs if value.name == "positions")
        tokens = next(value for value in model.graph.inputs if value.name == "tokens")
        zero, one = (ir.node("Constant", [], {"value": ir.tensor(torch.tensor(n))}) for n in (0, 1))
        shape = ir.node("Shape", [tokens])
        size = ir.node("Squeeze", [shape.outputs[0]])
        counted = ir.node("Range", [zero.outputs[0], size.outputs[0], one.outputs[0]])
        model.graph.insert_before(model.graph[0], [zero, one, shape, size, counted])
        positions.replace_all_uses_with(counted.outputs[0])
        return model

    with pytest.raises(BuildError, match="opt computes other logits"):
        self_check(FAMILIES["opt"](), count)


@pytest.fixture(scope="module")
def structure():
    return export(FAMILIES["mistral"](), torch.float32)


def test_structure_of_a_right_model(structure):
    check_structure(structure, FAMILIES["mistral"]())


def test_a_layer_without_attention_is_found(structure):
    config = FAMILIES["mistral"]()
    config.num_hidden_layers = 3
    with pytest.raises(BuildError, match="2 attention calls for 3 layers"):
        check_structure(structure, config)


@pytest.mark.parametrize("op_type", ["Conv", "CumSum", "Loop", "Softmax"])
def test_ops_along_the_tokens_are_found(structure, op_type):
    scores = ir.Value(name="scores", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["T", "T"]))
    node = ir.node(op_type, [scores])
    structure.graph.append(node)
    try:
        with pytest.raises(BuildError, match=op_type):
            check_structure(structure, FAMILIES["mistral"]())
    finally:
        structure.graph.remove(node)


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256, "eos_token_id": 128001, "bos_token_id": 128000}  # fmt: skip


def test_shrink_keeps_what_matters():
    config = LlamaConfig(**LLAMA_8B, tie_word_embeddings=True, attention_bias=True)
    small = shrink(config)
    assert config.hidden_size == 4096 and config.num_hidden_layers == 32
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (4, 2, 128)
    assert (small.num_hidden_layers, small.hidden_size) == (2, 512)
    assert small.vocab_size <= 512 and small.eos_token_id < small.vocab_size
    assert small.tie_word_embeddings and small.attention_bias


@pytest.mark.parametrize(
    "model_type, layers", [("gemma3_text", 6), ("gpt_oss", 2), ("smollm3", 4), ("cohere2", 4), ("qwen3", 2)]
)
def test_shrink_keeps_every_kind_of_layer(model_type, layers):
    """The default configs of real sizes: windows, layers without RoPE, full attention now and then."""
    config = AutoConfig.for_model(model_type)
    small = shrink(config)
    assert small.num_hidden_layers == layers
    assert set(small.layer_types) == set(config.layer_types)
    assert small.layer_types == config.layer_types[:layers]
    if getattr(config, "sliding_window", None):
        assert small.sliding_window < 16


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_small_already(family):
    """So that tests, which remember exports, export each family once."""
    assert shrink(FAMILIES[family]()).to_dict() == FAMILIES[family]().to_dict()


def test_a_real_size_is_checked_quickly():
    """The check does not depend on the size of the model: 8B parameters would take minutes and 32 GB."""
    assert self_check(LlamaConfig(**LLAMA_8B)) < 1e-5
