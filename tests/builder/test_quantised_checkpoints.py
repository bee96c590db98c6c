"""Checkpoints of other quantisers: each format against what it is documented to stand for, weights and logits."""

import pytest
import quantised_models as written
import torch
from families import FAMILIES
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.node_major import Windows
from ingot.builder.passes import drop_dead, optimise
from ingot.builder.passes.graph import nodes
from ingot.builder.passes.lowering import lower_quantised
from ingot.builder.stored_weights import keep_stored
from ingot.builder.weights import bind_weights
from ingot.engines.step import LOGITS
from ingot.plugins.dtypes import TORCH_DTYPES
from ingot.plugins.interpreter import Program
from quantised_models import awq, eight_bits, fp8_blocks, gptq, group_config, packed
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

INT8, FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
TOKEN = {"strategy": "token", "dynamic": True}
FORMATS = {
    # name: how weights are made, what config.json says, activations (dtype, columns of a scale, static)
    "gptq": (gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, None),
    "gptq-v2": (gptq(version=2), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False,
                                  "checkpoint_format": "gptq_v2"}, None),
    "gptq-symmetric-8": (gptq(8, symmetric=True), {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True},
                         None),
    "gptq-8-zeros-channel": (gptq(8, group=-1), {"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False},
                             None),
    "gptq-act-order": (gptq(act_order=True), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False,
                                              "desc_act": True}, None),
    "gptq-own-orders": (gptq(act_order=True, shared_order=False, symmetric=True),
                        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, None),
    "awq": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, None),
    "fp8-block": (fp8_blocks(), {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
                  ("fp8", 32, False)),
    "fp8-block-edges": (fp8_blocks(40, 40, exponents=True), {"quant_method": "fp8", "weight_block_size": [40, 40],
                                                             "scale_fmt": "ue8m0"}, ("fp8", 40, False)),
    "fp8-static": (eight_bits(by="tensor", static=True),
                   {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, ("fp8", 0, True)),
    "modelopt": (eight_bits(by="tensor", static=True), {"quant_method": "modelopt", "quant_algo": "FP8"},
                 ("fp8", 0, True)),
    "modelopt-channel": (eight_bits(), {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
                         ("fp8", 0, False)),
    "ct-fp8-dynamic": (eight_bits(), group_config("float-quantized", FP8 | {"strategy": "channel"}, FP8 | TOKEN),
                       ("fp8", 0, False)),
    "ct-fp8-static": (eight_bits(by="tensor", static=True),
                      group_config("naive-quantized", FP8 | {"strategy": "tensor"}, FP8), ("fp8", 0, True)),
    "ct-fp8-block": (fp8_blocks(suffix="weight_scale"),
                     group_config("float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]},
                                  FP8 | {"strategy": "group", "group_size": 32, "dynamic": True}), ("fp8", 32, False)),
    "ct-int8": (eight_bits("int"), group_config("int-quantized", INT8 | {"strategy": "channel"}, INT8 | TOKEN),
                ("int8", 0, False)),
    "ct-int8-static-zeros": (eight_bits("int", static=True, symmetric=False),
                             group_config("int-quantized", INT8 | {"strategy": "channel", "symmetric": False},
                                          INT8 | {"strategy": "tensor"}), ("int8", 0, True)),
    "ct-w4a16": (packed(), group_config("pack-quantized", {"num_bits": 4, "type": "int", "group_size": 32}), None),
    "ct-w4a16-zeros-order": (packed(symmetric=False, act_order=True),
                             group_config("pack-quantized", {"num_bits": 4, "type": "int", "group_size": 32,
                                                             "symmetric": False, "actorder": "group"}), None),
    "ct-w8a16-channel": (packed(8, -1), group_config("pack-quantized", INT8 | {"strategy": "channel"}), None),
}  # fmt: skip


NUM_LINEARS = 7


def config(layers=1):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = layers
    return config


@pytest.fixture(scope="module")
def exported():
    """Exporting takes seconds, and is the same for all."""
    return export(config(), torch.float32)


def engine_graph(exported, folder):
    checkpoint = Checkpoint.open(str(folder))
    graph = exported.clone()
    bind_weights(graph, checkpoint)
    optimise(graph)
    return graph, keep_stored(graph, checkpoint.quantised)


def logits_of(graph, tokens):
    windows = Windows(tokens)
    pools = {v.name: torch.zeros(*tokens.shape, *(d for d in v.shape if isinstance(d, int))).to(TORCH_DTYPES[v.dtype])
             for v in graph.graph.inputs if "pages." in v.name}  # fmt: skip
    return Program(graph, {})({**windows.inputs(), **pools})[LOGITS].reshape(*tokens.shape, -1)


def random_tokens(vocab=304):
    return torch.randint(3, vocab, (3, 17), generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def quantise_inputs(model, weights, dtype, group, static):
    """Lets the Linears of transformers' model read what they would in the format."""
    reach, lowest, highest = (448.0, -448.0, 448.0) if dtype == "fp8" else (127.5, -128.0, 127.0)

    def hook(name, module, inputs):
        (x,) = inputs
        if static:
            scale = torch.tensor(0.05 if name.endswith("v_proj") else 0.06, dtype=torch.bfloat16).float()
            blocks = x[..., None, :]
        else:
            blocks = torch.stack([torch.nn.functional.pad(part, (0, (group or x.shape[-1]) - part.shape[-1]))
                                  for part in x.split(group or x.shape[-1], -1)], -2)  # fmt: skip
            scale = blocks.abs().amax(-1, keepdim=True) / reach
        numbers = (blocks / scale).clamp(lowest, highest)
        numbers = numbers.to(torch.float8_e4m3fn).float() if dtype == "fp8" else numbers.round()
        return ((numbers * scale).flatten(-2)[..., : x.shape[-1]],)

    for name, module in model.named_modules():
        if name in weights:
            module.register_forward_pre_hook(lambda module, inputs, name=name: hook(name, module, inputs))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_and_logits(name, exported, tmp_path):
    make, description, activations = FORMATS[name]
    result = written.write(tmp_path, config(), make, description)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.quantised.modules.keys() == result.weights.keys()
    for module, weight in result.weights.items():
        assert torch.equal(checkpoint.tensor(f"{module}.weight"), weight)
    graph, told = engine_graph(exported, tmp_path)
    assert told["weights"] == len(result.weights) == NUM_LINEARS and not told["dequantised"]["weights"]
    tokens = random_tokens()
    with torch.inference_mode():
        expected = plain = result.model(tokens.long()).logits
        if activations:
            quantise_inputs(result.model, result.weights, *activations)
            expected = result.model(tokens.long()).logits
    found = logits_of(graph, tokens)
    lower_quantised(graph)
    drop_dead(graph)
    assert len(nodes(graph, "Linear")) == 1 and not nodes(graph, "DequantizeLinear")  # all but the head
    lowered = logits_of(graph, tokens)
    if not activations:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lowered, found, rtol=1e-4, atol=1e-4)
    else:  # a sum that differs in its last bit may be rounded to the next number of 8 bits
        effect = (plain - expected).abs().mean()
        assert (found - expected).abs().mean() < 0.05 * effect
        assert (lowered - found).abs().mean() < 0.05 * effect


@pytest.mark.parametrize("heads", [(), (2, 1, 1)], ids=["tensor", "head"])
def test_the_kv_cache_is_in_the_checkpoint_s_scales(exported, tmp_path, heads):
    """Against eager attention over keys, after the rotation, and values that were rounded to the stored FP8 grid."""
    description = group_config("pack-quantized", INT8 | {"strategy": "channel"})
    description["kv_cache_scheme"] = FP8 | {"strategy": "attn_head" if heads else "tensor", "dynamic": False}
    result = written.write(tmp_path, config(), packed(8, -1), description)
    scales = {f"model.layers.0.self_attn.{kind}_scale": torch.rand(heads) * 0.05 + 0.02 for kind in "kv"}
    written.change(tmp_path, change_tensors=lambda tensors: tensors.update(scales))
    graph, told = engine_graph(exported, tmp_path)
    assert told["kv_cache"] == {"dtype": "fp8_e4m3"}
    tokens = random_tokens()

    def rounded(x, scale):  # [B, heads, T, D]
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def attention(module, query, key, value, *args, **options):
        key, value = (rounded(x, scale) for x, scale in zip((key, value), scales.values(), strict=True))
        return eager_attention_forward(module, query, key, value, *args, **options)

    ALL_ATTENTION_FUNCTIONS.register("rounded", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("rounded", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    with torch.inference_mode():
        plain = result.model(tokens.long()).logits
        result.model.set_attn_implementation("rounded")
        expected = result.model(tokens.long()).logits
    assert (logits_of(graph, tokens) - expected).abs().mean() < 0.05 * (plain - expected).abs().mean()


def test_what_is_packed(exported, tmp_path):
    """q|k|v and gate|up are one weight where columns and static scales agree, and are left apart where they do not."""
    counts = {}
    for name in ("gptq", "gptq-act-order", "gptq-own-orders", "modelopt"):
        make, description, _ = FORMATS[name]
        written.write(tmp_path / name, config(), make, description)
        graph, _ = engine_graph(exported, tmp_path / name)
        orders = [node for node in nodes(graph, "Gather") if "gather_columns" in (node.name or "")]
        counts[name] = len(nodes(graph, "Linear")) - 1, len(orders)
    # modelopt's v_proj has an input scale of its own; what q|k|v, o, gate|up and down read is put in order
    assert counts == {"gptq": (4, 0), "gptq-act-order": (4, 4), "gptq-own-orders": (7, 7), "modelopt": (6, 0)}


def test_one_gather_for_readers_of_one_order(exported, tmp_path):
    """q, k and v in one order, but v in other bits: one Gather; and GPTQModel's options of single layers."""
    make = gptq(act_order=True, eight=("v_proj",))
    dynamic = {r"+:.*v_proj": {"bits": 8}, r"-:lm_head": {}}
    result = written.write(tmp_path, config(), make, FORMATS["gptq-act-order"][1] | {"dynamic": dynamic})
    graph, _ = engine_graph(exported, tmp_path)
    orders = [node for node in nodes(graph, "Gather") if "gather_columns" in (node.name or "")]
    assert (len(nodes(graph, "Linear")) - 1, len(orders)) == (6, 4)
    with torch.inference_mode():
        expected = result.model(random_tokens().long()).logits
    torch.testing.assert_close(logits_of(graph, random_tokens()), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_left_alone(exported, tmp_path):
    """Ignored layers, a bias and the head are as they are; with v ignored, q|k|v is not one weight."""
    ignored = ("lm_head", "layers.0.self_attn.v_proj", "layers.0.mlp.down_proj")
    make, description, _ = FORMATS["ct-w4a16"]
    result = written.write(tmp_path, config(), make, description | {"ignore": list(ignored)}, skip=ignored)
    graph, told = engine_graph(exported, tmp_path)
    assert told["weights"] == 5 and len(nodes(graph, "DequantizeLinear")) == 4
    assert {name for name in graph.graph.initializers if "down_proj" in name or "v_proj" in name} == {
        "model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight"
    }  # fmt: skip
    with torch.inference_mode():
        expected = result.model(random_tokens().long()).logits
    torch.testing.assert_close(logits_of(graph, random_tokens()), expected, rtol=1e-4, atol=1e-4)


def test_config_groups(tmp_path):
    """A group that names a module comes before one with a pattern, and that before one for all Linears."""
    four, eight = {"num_bits": 4, "type": "int", "group_size": 32}, INT8 | {"strategy": "channel"}

    def make(name, rows, columns):
        kinds = {"o_proj": packed(), "gate_proj": eight_bits("int"), "up_proj": eight_bits("int")}
        return kinds.get(name.rpartition(".")[2], eight_bits())(name, rows, columns)

    def group(targets, weights, form):
        return {"targets": targets, "weights": weights, "format": form}

    description = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {
            "all": group(["Linear"], FP8 | {"strategy": "channel"}, "float-quantized"),
            "pattern": group(["re:.*mlp.(gate|up)_proj", "re:.*o_proj"], eight, "int-quantized"),
            "name": group(["model.layers.0.self_attn.o_proj"], four, "pack-quantized"),
        },
    }  # fmt: skip
    result = written.write(tmp_path, config(), make, description)
    checkpoint = Checkpoint.open(str(tmp_path))
    for module, weight in result.weights.items():
        assert torch.equal(checkpoint.tensor(f"{module}.weight"), weight)
    assert checkpoint.quantised.spelt() == (
        "compressed-tensors: 4 weights as fp8_e4m3, 2 weights as int8, 1 weights as int4 in groups of 32"
    )


# -- what cannot stay in few bits --------------------------------------------------------------------------------------


def test_experts_are_dequantised(tmp_path):
    """Attention stays in FP8; experts, stored one by one, are put together in the activation dtype, and it is said."""
    few = FAMILIES["qwen3_moe"]()
    few.num_hidden_layers = 1
    description = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    result = written.write(tmp_path, few, fp8_blocks(), description, skip=("lm_head", "mlp.gate"))
    checkpoint = Checkpoint.open(str(tmp_path))
    graph = optimise(export(checkpoint, torch.float32))
    told = keep_stored(graph, checkpoint.quantised)
    assert told["weights"] == 4 and told["dequantised"]["weights"] == 3 * few.num_experts
    quantise_inputs(result.model, {n: w for n, w in result.weights.items() if "self_attn" in n}, "fp8", 32, False)
    with torch.inference_mode():
        expected = result.model(random_tokens().long()).logits
    assert (logits_of(graph, random_tokens()) - expected).abs().mean() < 2e-3 * expected.abs().mean()
