"""The exported graph is the contract's: names, shapes, attributes, dtypes, no weight in it, nothing of the tracer."""

import json

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES
from ingot.builder.empty_model import empty_model
from ingot.builder.export import export
from ingot.builder.hooks import describe_experts, paged_attention
from ingot.engines import step
from ingot.engines.errors import BuildError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


@pytest.fixture(scope="module")
def gemma():
    return export(FAMILIES["gemma2"](), "bfloat16")


@pytest.fixture(scope="module")
def gpt_oss():
    return export(FAMILIES["gpt_oss"](), torch.float32)


def nodes(model, op_type):
    return [node for node in model.graph if node.op_type == op_type]


def attributes(node):
    return {name: attribute.value for name, attribute in node.attributes.items()}


def declared(value):
    return value.dtype, [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def test_inputs_and_outputs(gemma):
    inputs = {value.name: declared(value) for value in gemma.graph.inputs}
    shapes = {"tokens": ["T"], "positions": ["T"], "slots": ["T"], "query_start": ["S+1"], "kv_len": ["S"],
              "pages": ["S", "P"], "logit_rows": ["R"]}  # fmt: skip
    assert tuple(inputs)[: len(shapes)] == step.STEP_INPUTS
    for name, shape in shapes.items():
        assert inputs.pop(name) == (ir.DataType.INT32, shape)
    pool = (ir.DataType.BFLOAT16, ["num_pages", "page_size", 2, 32])
    assert inputs == {f"{kind}_pages.{layer}": pool for layer in range(2) for kind in "kv"}
    assert [(value.name, *declared(value)) for value in gemma.graph.outputs] == [
        ("logits", ir.DataType.BFLOAT16, ["R", 304])
    ]


def test_attention_nodes(gemma):
    for layer, node in enumerate(nodes(gemma, "PagedAttention")):
        assert node.domain == "ingot"
        assert [value.name for value in node.inputs[3:]] == [
            "slots", "query_start", "kv_len", "pages", f"k_pages.{layer}", f"v_pages.{layer}"
        ]  # fmt: skip
        assert [declared(value) for value in node.inputs[:3]] == [
            (ir.DataType.BFLOAT16, ["T", width]) for width in (128, 64, 64)
        ]
        found = attributes(node)
        assert found.pop("scale") == pytest.approx(24**-0.5)
        assert found == {"layer": layer, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "v_head_dim": 32,
                         "window": 0 if layer % 2 else 8, "softcap": 2.0}  # fmt: skip


def test_sinks_are_the_last_input(gpt_oss):
    sinks = [node.inputs[9].name for node in nodes(gpt_oss, "PagedAttention")]
    assert sinks == [f"model.layers.{layer}.self_attn.sinks" for layer in range(2)]


def test_experts_nodes(gpt_oss):
    first = nodes(gpt_oss, "Experts")[0]
    prefix = "model.layers.0.mlp.experts."
    weights = ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]
    assert [value.name for value in first.inputs[3:]] == [prefix + name for name in weights]
    found = attributes(first)
    assert found.pop("alpha") == pytest.approx(1.702)
    assert found == {"activation": "swiglu_oai", "transposed": 1, "interleaved": 1, "limit": 7.0}


def test_initialisers_are_the_parameters_without_data(gemma):
    config = FAMILIES["gemma2"]()
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    empty = {name: value for name, value in gemma.graph.initializers.items() if value.const_value is None}
    assert empty.keys() == expected.keys() - {"lm_head.weight"}, "the head is tied to the embedding"
    for name, value in empty.items():
        assert declared(value) == (ir.DataType.BFLOAT16, list(expected[name].shape))
    buffers = gemma.graph.initializers.keys() - empty.keys()
    assert "model.rotary_emb.inv_freq" in buffers
    assert gemma.graph.initializers["model.rotary_emb.inv_freq"].dtype == ir.DataType.FLOAT


def test_nothing_of_the_tracer_is_left(gemma):
    for node in gemma.graph:
        assert not node.metadata_props and not node.doc_string
    assert not any(value.metadata_props for node in gemma.graph for value in node.outputs)
    assert not any(value.metadata_props for value in gemma.graph.initializers.values())


def test_opset(gemma):
    assert gemma.opset_imports[""] >= 23 and gemma.opset_imports["ingot"] == 1


def test_the_config_is_left_alone():
    config = FAMILIES["mixtral"]()
    before = json.dumps(config.to_dict(), default=str)
    empty_model(config, torch.float16)
    assert json.dumps(config.to_dict(), default=str) == before


@pytest.mark.parametrize("family", ["llama3_rope", "gpt_oss", "gemma3", "gpt_neox", "gpt2", "opt"])
def test_buffers_are_computed_as_transformers_does(family):
    config = FAMILIES[family]()
    expected = dict(AutoModelForCausalLM.from_config(config, dtype=torch.float32).named_buffers())
    model = empty_model(config, torch.float32)
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name
    assert all(parameter.is_meta for parameter in model.parameters())


def longrope(max_position_embeddings):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
            "long_factor": [float(2 + i) for i in range(8)], "original_max_position_embeddings": 64}  # fmt: skip
    config = FAMILIES["phi3"]()
    config.rope_parameters = rope
    config.max_position_embeddings, config.original_max_position_embeddings = max_position_embeddings, 64
    return config


@pytest.mark.parametrize("context, length", [(64, 10), (256, 100)])
def test_longrope_is_pinned_by_the_context(context, length):
    """The table is that which transformers takes for `length` positions, whatever the batch holds."""
    config = longrope(context)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.rotary_emb
    ours = empty_model(config, torch.float32).model.rotary_emb
    x = torch.zeros(1)
    expected = theirs(x, torch.arange(length)[None])
    short = [table[:, :5] for table in expected]
    for found, table in zip(ours(x, torch.arange(5)[None]), short, strict=True):
        assert torch.equal(found, table)


def test_unknown_gate_of_experts_is_refused():
    class Odd(nn.Module):
        is_concatenated, is_transposed, has_gate, has_post_expert_norm = True, False, True, False

        def _apply_gate(self, x):
            gate, up = x.chunk(2, -1)
            return torch.sin(gate) * up

    with pytest.raises(BuildError, match="Odd"):
        describe_experts(nn.ModuleDict({"experts": Odd()}))


@pytest.mark.parametrize("option", ["attention_mask", "position_bias"])
def test_a_mask_of_its_own_is_refused(option):
    q = torch.zeros(1, 2, 3, 4)
    options = {"attention_mask": None, option: torch.zeros(1, 1, 3, 3)}
    with pytest.raises(BuildError, match="of its own"):
        paged_attention(nn.Identity(), q, q, q, **options)


def test_bidirectional_attention_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(BuildError, match="both directions"):
        paged_attention(nn.Identity(), q, q, q, None, is_causal=False)


@pytest.mark.parametrize("model_type", ["t5", "vit", "llava"])
def test_not_a_text_decoder(model_type):
    from transformers import CONFIG_MAPPING

    config: PretrainedConfig = CONFIG_MAPPING[model_type]()
    with pytest.raises(BuildError, match=model_type):
        export(config, "float32")
