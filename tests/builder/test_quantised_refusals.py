"""Quantised checkpoints that are not served, each in one sentence that names what was found; and what a build says."""

import json

import pytest
import quantised_models as written
import torch
from families import FAMILIES
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.builder import find_scales
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.weights import load_plan
from ingot.engines.errors import BuildError
from ingot.engines.manifest import Manifest
from quantised_models import awq, change, eight_bits, fp8_blocks, gptq, group_config, packed

FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "group_size": 32}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
PROJ = "model.layers.0.self_attn.q_proj"
MAKES = {
    "gptq": (gptq(), {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}),
    "awq": (awq(), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "fp8": (fp8_blocks(), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "modelopt": (eight_bits(by="tensor", static=True), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "ct": (eight_bits(), group_config("float-quantized", FP8)),
    "packed": (packed(), group_config("pack-quantized", INT4)),
}


def model(folder, kind):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    return written.write(folder, config, *MAKES[kind])


def refusal(folder) -> str:
    with pytest.raises(BuildError) as error:
        Checkpoint.open(str(folder))
    message = str(error.value)
    assert "\n" not in message and (";" in message) and not message.endswith(" ")
    return message


def set_group(**options):
    def change_config(config):
        group = config["config_groups"]["group_0"]
        for key, value in options.items():
            group[key] = value

    return change_config


@pytest.mark.parametrize("kind, changed, words", [
    ("gptq", {"quant_method": "bitsandbytes"}, "quantised by bitsandbytes, which ingot does not read .it reads comp"),
    ("gptq", {"quant_method": "mxfp4"}, "quantised by mxfp4"),
    ("gptq", {"bits": 3}, "in 3 bits by GPTQ, expected 4 or 8"),
    ("gptq", {"checkpoint_format": "marlin"}, "GPTQ in the format marlin"),
    ("gptq", {"group_size": 56}, "groups of 56, which do not divide its [69][46] columns"),
    ("gptq", {"group_size": 16}, "'.*g_idx'|'.*scales' as float16"),
    ("gptq", {"sym": True}, ""),
    ("awq", {"version": "gemv"}, "AWQ with version gemv, expected gemm"),
    ("awq", {"bits": 8}, "AWQ with bits 8, expected 4"),
    ("awq", {"zero_point": False}, "zero_point False, expected True"),
    ("fp8", {"activation_scheme": "static"}, "in blocks with activation_scheme static"),
    ("fp8", {"fmt": "e5m2"}, "fmt e5m2"),
    ("fp8", {"expert_dtype": "fp4"}, "expert_dtype fp4"),
    ("fp8", {"weight_block_size": [16, 16]}, r"scale_inv' as float32 \[2, 3\], expected the shape \[4, 6\]"),
    ("modelopt", {"quant_algo": "NVFP4"}, "by ModelOpt with NVFP4, expected FP8"),
    ("modelopt", {"kv_cache_quant_algo": "NVFP4"}, "KV cache in NVFP4, expected FP8"),
    ("modelopt", {"kv_cache_quant_algo": "FP8"}, "KV cache is in fp8_e4m3, but stores no scale for k_pages.0 .2 of 2"),
    ("ct", {"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized, expected one of"),
    ("ct", {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}}, "by 2:4 sparsity"),
    ("ct", {"transform_config": {"config_groups": {}}}, "rotates its activations"),
    ("ct", {"kv_cache_scheme": KV}, "KV cache is in fp8_e4m3, but stores no scale"),
    ("ct", {"kv_cache_scheme": KV | {"num_bits": 4}}, "KV cache scheme 4-bit float by tensor"),
    ("ct", {"config_groups": {}}, "no config group of its quantization_config is for it"),
])  # fmt: skip
def test_options_that_are_not_served(tmp_path, kind, changed, words):
    model(tmp_path, kind)
    change(tmp_path, lambda config: config.update(changed))
    if words:
        with pytest.raises(BuildError, match=words):
            Checkpoint.open(str(tmp_path))
        refusal(tmp_path)
    else:  # zero points are looked at when they are read
        checkpoint = Checkpoint.open(str(tmp_path))
        with pytest.raises(BuildError, match="is symmetric, but stores other zero points; set sym to false"):
            checkpoint.tensor(f"{PROJ}.weight")


@pytest.mark.parametrize("kind, group, words", [
    ("ct", {"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}},
     "weights of .* in 4-bit float by tensor_group"),
    ("packed", {"weights": INT4 | {"num_bits": 3}}, "weights of .* in 3-bit int"),
    ("packed", {"weights": INT4 | {"group_size": 56}}, "groups of 56, which do not divide"),
    ("ct", {"input_activations": FP8 | {"strategy": "tensor", "dynamic": True}}, "8-bit float by tensor, dynamic True"),
    ("ct", {"input_activations": FP8 | {"strategy": "token", "dynamic": True, "symmetric": False}}, "asymmetric"),
    ("ct", {"input_activations": FP8 | {"strategy": "tensor"}}, "quantised, but without its 'input_scale'"),
    ("ct", {"output_activations": FP8}, "output_activations"),
    ("packed", {"weights": INT4 | {"symmetric": False}}, "without its 'weight_zero_point'"),
])  # fmt: skip
def test_schemes_that_are_not_served(tmp_path, kind, group, words):
    model(tmp_path, kind)
    change(tmp_path, set_group(**group))
    with pytest.raises(BuildError, match=words):
        Checkpoint.open(str(tmp_path))
    refusal(tmp_path)


def drop(name):
    return lambda tensors: tensors.pop(f"{PROJ}.{name}")


def put(name, tensor, module=PROJ):
    return lambda tensors: tensors.update({f"{module}.{name}": tensor})


@pytest.mark.parametrize("kind, changed, words", [
    ("gptq", drop("scales"), "q_proj' quantised, but without its 'scales'; download"),
    ("gptq", put("scales", torch.ones(2, 8)), r"scales' as float32 \[2, 8\], expected the shape \[2, 64\]"),
    ("gptq", put("qweight", torch.ones(8, 64)), "qweight' as float32 .*, expected int32"),
    ("gptq", put("g_idx", torch.zeros(64, dtype=torch.int32)), "groups that are not all of 32 columns"),
    ("awq", drop("qzeros"), "without its 'qzeros'"),
    ("awq", put("extra", torch.ones(1)), "q_proj.extra', which its quantisation does not explain"),
    ("fp8", drop("weight_scale_inv"), "without its 'weight_scale_inv'"),
    ("modelopt", put("pre_quant_scale", torch.ones(64)), "pre_quant_scale', which"),
    ("modelopt", put("input_scale", torch.zeros(1)), "stores 0 as .*input_scale"),
    ("ct", put("q_scale", torch.ones(1), "model.layers.0.self_attn"), "quantises the queries"),
])  # fmt: skip
def test_tensors_that_do_not_fit(tmp_path, kind, changed, words):
    model(tmp_path, kind)
    change(tmp_path, change_tensors=changed)
    with pytest.raises(BuildError, match=words):
        Checkpoint.open(str(tmp_path))
    refusal(tmp_path)


@pytest.mark.parametrize("kind, name, tensor, words", [
    ("ct", "weight_scale", torch.full((64, 1), torch.nan), "negative or not finite"),
    ("fp8", "weight_scale_inv", -torch.ones(2, 2), "negative or not finite"),
    ("fp8", "weight", torch.full((64, 64), torch.nan).to(torch.float8_e4m3fn), "stores NaN"),
])  # fmt: skip
def test_numbers_that_are_none(tmp_path, kind, name, tensor, words):
    model(tmp_path, kind)
    change(tmp_path, change_tensors=put(name, tensor))
    with pytest.raises(BuildError, match=words):
        Checkpoint.open(str(tmp_path)).tensor(f"{PROJ}.weight")


def test_few_bits_without_scales(tmp_path):
    """FP8 that no scale goes with is not taken for the weights themselves."""
    from ingot.builder.empty_model import empty_model

    model(tmp_path, "ct")
    change(tmp_path, change_tensors=drop("weight_scale"))
    checkpoint = Checkpoint.open(str(tmp_path))
    with pytest.raises(BuildError, match="q_proj.weight' as float8_e4m3fn, in few bits without the scales"):
        load_plan(checkpoint, empty_model(checkpoint.config, torch.float32), torch.float32)


def test_a_model_that_stores_its_weights_transposed(tmp_path):
    """A square one too, whose shape says nothing."""
    from ingot.builder.empty_model import empty_model

    config = FAMILIES["gpt2"]()
    written.write(tmp_path, config, gptq(), MAKES["gptq"][1], skip=("lm_head",))
    name = "transformer.h.0.attn.c_proj"
    tensors, _ = gptq()(name, 64, 64)

    def quantise(stored):
        stored.pop(f"{name}.weight")
        stored.update({f"{name}.{kind}": tensor.contiguous() for kind, tensor in tensors.items()})

    change(tmp_path, change_tensors=quantise)
    checkpoint = Checkpoint.open(str(tmp_path))
    with pytest.raises(BuildError, match="attn.c_proj.weight' in few bits, but gpt2 has it transposed"):
        load_plan(checkpoint, empty_model(checkpoint.config, torch.float32), torch.float32)


def test_nothing_quantised(tmp_path):
    model(tmp_path, "ct")

    def plain(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            del tensors[name]

    change(tmp_path, change_tensors=plain)
    assert "says that it is quantised by compressed-tensors, but stores no weight so" in refusal(tmp_path)


def test_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file" in refusal(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama"]().to_dict()))
    assert "holds GGUF files only" in refusal(tmp_path)


# -- the KV cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, changed, places", [
    ("ct", {"kv_cache_scheme": KV}, ("self_attn.k_scale", "self_attn.v_scale")),
    ("ct", {"kv_cache_scheme": KV}, ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale")),
    ("modelopt", {"kv_cache_quant_algo": "FP8"}, ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")),
    ("modelopt", {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}},
     ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1)])
def test_scales_of_the_kv_cache(tmp_path, kind, changed, places, shape):
    model(tmp_path, kind)
    found = {f"model.layers.0.{name}": torch.rand(shape) + 0.1 for name in places}
    change(tmp_path, lambda config: config.update(changed), lambda tensors: tensors.update(found))
    kv = Checkpoint.open(str(tmp_path)).quantised.kv
    assert kv.dtype == "fp8_e4m3" and list(kv.scales) == ["k_pages.0", "v_pages.0"]
    for scale, stored in zip(kv.scales.values(), found.values(), strict=True):
        assert torch.equal(scale, stored.reshape(-1))


def test_modelopt_description_in_its_own_file(tmp_path):
    model(tmp_path, "modelopt")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    details = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": details}))
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.quantised.method == "modelopt" and len(checkpoint.quantised.modules) == 7
    (tmp_path / "hf_quant_config.json").write_text("[1")
    assert "hf_quant_config.json is not a JSON object" in refusal(tmp_path)


# -- builds ------------------------------------------------------------------------------------------------------------


def test_an_engine(tmp_path):
    """In bfloat16, from the checkpoint to tokens; the manifest says what it is made of."""
    model(tmp_path / "model", "packed")
    out = tmp_path / "engine"
    build_engine(BuildConfig(str(tmp_path / "model"), str(out), dtype="bfloat16"))
    told = Manifest.open(out).quantisation
    assert told["checkpoint"] == "compressed-tensors" and told["weights"] == 7
    assert told["scheme"] == "compressed-tensors: 7 weights as int4 in groups of 32"
    with LLM(out) as llm:
        (answer,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=6, temperature=0.0), progress=False)
    assert len(answer.outputs[0].token_ids) == 6


@pytest.mark.parametrize("options, words", [
    ({"quant": "w8a16"}, "is quantised already .gptq., and --quant w8a16 would round it a second time; leave out"),
    ({"kv_cache": "fp8"}, "is quantised already .gptq., so there is nothing to calibrate .*; leave out --kv-cache"),
    ({"calibration_width": 64}, "is quantised already .gptq., so .*; leave out --calibration-width"),
    ({"calibration_data": "text.txt"}, "is quantised already .gptq., so there is nothing to calibrate"),
])  # fmt: skip
def test_options_of_a_build(tmp_path, options, words):
    model(tmp_path / "model", "gptq")
    with pytest.raises(BuildError, match=words):
        build_engine(BuildConfig(str(tmp_path / "model"), str(tmp_path / "engine"), **options))
    with pytest.raises(BuildError, match=words):  # before hours of it, not behind
        find_scales(BuildConfig(str(tmp_path / "model"), str(tmp_path / "scales.safetensors"), **options))
