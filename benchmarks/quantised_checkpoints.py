"""Checkpoints written by the libraries of each format, read by ingot: weights and logits against those libraries.

    python benchmarks/quantised_checkpoints.py [CASE ..]     # all cases on the demo model and on a random Qwen3

For each case a library quantises a model on the CPU and saves it; ingot opens what was saved. Compared are the weights,
bit for bit, with what the library itself makes of its numbers, and the logits of the graph that ingot writes (in
float32) with the library's model, its activation quantisation included; where a library runs no such model on a CPU
(AWQ, GPTQ, the kernels of FineGrained FP8), its dequantised weights are in transformers' model. `effect` is how far
quantised activations and keys move the logits, so that an error of a part of it means that ties are rounded otherwise.
Needs llmcompressor, compressed-tensors, autoawq, auto-gptq and nvidia-modelopt; a case says if its library is missing.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.node_major import Windows
from ingot.builder.passes import optimise
from ingot.builder.stored_weights import keep_stored
from ingot.engines.step import LOGITS
from ingot.plugins.dtypes import TORCH_DTYPES
from ingot.plugins.interpreter import Program
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "engines" / "demo" / "pycoder-14m"
GROUP = 128
SCRATCH = tempfile.TemporaryDirectory()


class Saved(NamedTuple):
    """`weights`: what the library makes of its own numbers, by module. `model`: what it computes with them, float32."""

    weights: dict[str, Tensor]
    model: PreTrainedModel


Case = Callable[[PreTrainedModel, Path], Saved]


def demo() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO)


def qwen3() -> PreTrainedModel:
    """Sizes that 128 does not divide where the formats allow it, norms of the heads, an untied head, biases."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attention_bias=True, max_position_embeddings=256,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    folder = Path(SCRATCH.name) / "qwen3"  # llm-compressor wants to know where a model and its tokenizer lie
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not name.endswith("lm_head")}


def tokens(model: PreTrainedModel, num: int = 4, width: int = 64) -> Tensor:
    """Of this project's own text for the demo model, random ones for others."""
    if model.config.vocab_size == 512:
        return torch.randint(3, 512, (num, width), generator=torch.Generator().manual_seed(1))
    text = "\n".join(path.read_text() for path in sorted((ROOT / "runtime").glob("*.py")))
    return torch.tensor(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"][: num * width]).view(num, width)


# -- cases -------------------------------------------------------------------------------------------------------------


def compressed_tensors(scheme: str, kv: bool = False, calibrated: bool = False) -> Case:
    """llm-compressor writes it; transformers with compressed-tensors reads it back."""

    def case(model: PreTrainedModel, folder: Path) -> Saved:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        recipe = QuantizationModifier(
            targets="Linear", scheme=scheme, ignore=["lm_head"], kv_cache_scheme=fp8 if kv else None
        )
        data = {}
        if kv or calibrated:
            rows = tokens(model, 8).tolist()
            samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
            data = {"dataset": Dataset.from_list(samples), "num_calibration_samples": 8, "max_seq_length": 64}
        oneshot(model=model, recipe=recipe, **data)
        model.save_pretrained(folder, save_compressed=True)
        if "ASYM" in scheme:  # transformers 5 expects zero points of another shape
            return _decompressed(model, folder)
        back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            back(input_ids=tokens(back))  # some versions decompress at the first call
        return Saved({name: module.weight.data for name, module in linears(back).items()}, back)

    return case


def _decompressed(model: PreTrainedModel, folder: Path) -> Saved:
    """The library's decompressor alone, on the tensors of each module."""
    from compressed_tensors.compressors import BaseCompressor
    from safetensors.torch import load_file

    stored, weights = load_file(folder / "model.safetensors"), {}
    for name, linear in linears(model).items():
        scheme = linear.quantization_scheme
        state = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.weight")}
        decompressor = BaseCompressor.get_value_from_registry(str(getattr(scheme.format, "value", scheme.format)))
        weights[name] = decompressor.decompress(state, scheme)["weight"]
    plain = AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32).eval()
    for name, weight in weights.items():
        linears(plain)[name].weight.data = weight.float()
    return Saved(weights, plain)


def awq(model: PreTrainedModel, folder: Path) -> Saved:
    """AutoAWQ's rounding and packing (its search of scales changes the model before, not the format)."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    quantiser = AwqQuantizer.__new__(AwqQuantizer)
    quantiser.group_size, quantiser.zero_point, quantiser.w_bit = GROUP, True, 4
    packed, weights = {}, {}
    for name, linear in linears(model).items():
        half = linear.half()
        half.weight.data, scales, zeros = quantiser.pseudo_quantize_tensor(half.weight.data)
        made = WQLinear_GEMM.from_linear(half, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
        weights[name] = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, GROUP).T.contiguous()
        packed[name] = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}
    description = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return _save(model, folder, packed, weights, description)


def gptq(bits: int, act_order: bool, symmetric: bool) -> Case:
    """AutoGPTQ's GPTQ and packing, on random activations."""

    def case(model: PreTrainedModel, folder: Path) -> Saved:
        for name in ("", ".nn_modules", ".nn_modules.qlinear", ".quantization"):  # its models need transformers 4
            package = ModuleType(f"auto_gptq{name}")
            package.__path__ = [str(distribution("auto-gptq").locate_file(f"auto_gptq{name}".replace(".", "/")))]
            sys.modules.setdefault(package.__name__, package)
        from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
        from auto_gptq.quantization.gptq import GPTQ

        packed, weights = {}, {}
        torch.cuda.synchronize = lambda: None  # AutoGPTQ asks for it whatever the device
        for name, linear in linears(model).items():
            linear = linear.float()
            rounding = GPTQ(linear)
            rounding.quantizer.configure(bits, perchannel=True, sym=symmetric, mse=False)
            inputs = torch.randn(512, linear.in_features, generator=torch.Generator().manual_seed(linear.in_features))
            inputs *= torch.linspace(0.2, 3, linear.in_features)[torch.randperm(linear.in_features)]
            rounding.add_batch(inputs, None)
            scale, zero, index = rounding.fasterquant(group_size=GROUP, actorder=act_order)
            linear.half()
            layer = QuantLinear(bits, GROUP, linear.in_features, linear.out_features, linear.bias is not None)
            layer.pack(linear, scale.half(), zero, index.to(torch.int32))
            eye = torch.eye(linear.in_features, dtype=torch.float16)
            layer.bias, bias = None, layer.bias
            weights[name] = layer(eye).T.contiguous()  # dequantised by the layer itself
            packed[name] = {kind: getattr(layer, kind) for kind in ("qweight", "qzeros", "scales", "g_idx")}
            assert bias is None or torch.equal(bias, linear.bias)
        description = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order,
                       "sym": symmetric, "checkpoint_format": "gptq"}  # fmt: skip
        return _save(model, folder, packed, weights, description)

    return case


def finegrained_fp8(scale_fmt: str) -> Case:
    """transformers' own operation quantises; where there is no GPU it reads such a checkpoint back dequantised."""

    def case(model: PreTrainedModel, folder: Path) -> Saved:
        from transformers import FineGrainedFP8Config
        from transformers.integrations.finegrained_fp8 import Fp8Quantize

        class Quantiser:
            quantization_config = FineGrainedFP8Config(weight_block_size=(GROUP, GROUP), scale_fmt=scale_fmt)

        packed = {}
        for name, linear in linears(model).items():
            made = Fp8Quantize(Quantiser)._quantize_one(f"{name}.weight", linear.weight.data)
            packed[name] = {key.rpartition(".")[2]: tensor for key, tensor in made.items()}
        description = {**Quantiser.quantization_config.to_dict(), "quant_method": "fp8"}
        _save(model, folder, packed, {}, description)
        back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # of bfloat16 it makes the scales too
        back = back.float().eval()
        weights = {name: module.weight.data for name, module in linears(back).items()}
        for module in linears(back).values():  # its kernels for a GPU do this to what they read
            module.register_forward_pre_hook(lambda module, inputs: (_by_token(inputs[0], GROUP),))
        return Saved(weights, back)

    return case


def modelopt(kind: str) -> Case:
    """ModelOpt quantises and exports; the model with its fake quantisers is what it computes."""

    def case(model: PreTrainedModel, folder: Path) -> Saved:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from safetensors.torch import load_file

        config = deepcopy({"fp8": mtq.FP8_DEFAULT_CFG, "fp8-kv": mtq.FP8_DEFAULT_CFG,
                           "fp8-channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG}[kind])  # fmt: skip
        if kind == "fp8-kv":
            config = mtq.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
        mtq.quantize(model, config, lambda m: m(input_ids=tokens(m)))
        back = deepcopy(model).float().eval()
        export_hf_checkpoint(model, export_dir=folder)
        stored, weights = load_file(folder / "model.safetensors"), {}
        for name, module in linears(back).items():  # it divided in bfloat16, so what is stored is not its fake weight
            scale = stored[f"{name}.weight_scale"].reshape(-1, 1)
            module.weight.data = weights[name] = stored[f"{name}.weight"].float() * scale
            module.weight_quantizer.disable()
            module.input_quantizer.register_forward_hook(_as_defined(stored.get(f"{name}.input_scale")))
        for name, scale in stored.items():
            if name.endswith(("k_scale", "v_scale")):
                attention, what = back.get_submodule(name.rsplit(".", 2)[0]), name[-len("k_scale")]
                getattr(attention, f"{what}_bmm_quantizer").register_forward_hook(_as_defined(scale))
        return Saved(weights, back)

    return case


def _as_defined(scale: Tensor | None) -> Callable:
    """Lets a quantiser give x / scale in FP8, as the format is defined, having seen that it makes the same of x but for
    the last bit of float32. That bit decides ties, and one tie decided otherwise many more in later layers."""

    def hook(quantiser: nn.Module, inputs: tuple[Tensor, ...], own: Tensor) -> Tensor:
        x = inputs[0]
        defined = _by_token(x, x.shape[-1]) if scale is None else _rounded(x, scale)
        ties = (own - defined).abs() > 1e-5 * x.abs()
        assert ties.sum() <= 1e-4 * ties.numel(), f"{int(ties.sum())} of {ties.numel()} numbers are others"
        return defined

    return hook


def _save(model: PreTrainedModel, folder: Path, packed: dict, weights: dict, description: dict) -> Saved:
    """The model with the Linears in `packed` stored so, and a float32 one that has `weights`."""
    from safetensors.torch import save_file

    state = {name: tensor for name, tensor in model.state_dict().items() if name.removesuffix(".weight") not in packed}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    state |= {f"{name}.{kind}": tensor for name, kinds in packed.items() for kind, tensor in kinds.items()}
    config = deepcopy(model.config)
    config.quantization_config = description
    config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    model = model.float()
    for name, weight in weights.items():
        linears(model)[name].weight.data = weight.float()
    return Saved(weights, model.eval())


def _by_token(x: Tensor, group: int) -> Tensor:
    blocks = x.unflatten(-1, (-1, group))
    return _rounded(blocks, blocks.abs().amax(-1, keepdim=True) / 448).flatten(-2)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


CASES: dict[str, tuple[str, Case]] = {
    "ct fp8 dynamic": ("llmcompressor", compressed_tensors("FP8_DYNAMIC")),
    "ct fp8 static": ("llmcompressor", compressed_tensors("FP8", calibrated=True)),
    "ct fp8 static, kv": ("llmcompressor", compressed_tensors("FP8", kv=True)),
    "ct fp8 block": ("llmcompressor", compressed_tensors("FP8_BLOCK")),
    "ct int8 w8a8": ("llmcompressor", compressed_tensors("W8A8")),
    "ct w4a16": ("llmcompressor", compressed_tensors("W4A16")),
    "ct w4a16 zeros": ("llmcompressor", compressed_tensors("W4A16_ASYM")),
    "ct w8a16": ("llmcompressor", compressed_tensors("W8A16")),
    "awq": ("autoawq", awq),
    "gptq": ("auto-gptq", gptq(4, False, True)),
    "gptq zeros": ("auto-gptq", gptq(4, False, False)),
    "gptq act-order": ("auto-gptq", gptq(4, True, True)),
    "gptq 8, act-order": ("auto-gptq", gptq(8, True, False)),
    "fp8 block": ("transformers", finegrained_fp8("float")),
    "fp8 block ue8m0": ("transformers", finegrained_fp8("ue8m0")),
    "modelopt fp8": ("nvidia-modelopt", modelopt("fp8")),
    "modelopt fp8, kv": ("nvidia-modelopt", modelopt("fp8-kv")),
    "modelopt fp8 channel": ("nvidia-modelopt", modelopt("fp8-channel")),
}


# -- comparison --------------------------------------------------------------------------------------------------------


def logits_of(folder: Path, ids: Tensor) -> tuple[Tensor, str]:
    """Of the graph that ingot writes, in float32, and what the manifest says of it."""
    checkpoint = Checkpoint.open(str(folder))
    graph = optimise(export(checkpoint, torch.float32))
    assert checkpoint.quantised
    told = keep_stored(graph, checkpoint.quantised)
    pools = {
        value.name: torch.zeros(
            *ids.shape, *(dim for dim in value.shape if isinstance(dim, int)), dtype=TORCH_DTYPES[value.dtype]
        )
        for value in graph.graph.inputs
        if "pages." in value.name
    }
    program = Program(graph, {})
    with torch.inference_mode():
        logits = program({**Windows(ids.to(torch.int32)).inputs(), **pools})[LOGITS]
    return logits.reshape(*ids.shape, -1), told["scheme"]


def compare(library: str, case: Case, make: Callable[[], PreTrainedModel]) -> str:
    try:
        found = version(library)
    except PackageNotFoundError:
        return f"{library} is not installed"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        saved = case(make(), folder)
        checkpoint = Checkpoint.open(str(folder))
        equal = sum(
            torch.equal(checkpoint.tensor(f"{name}.weight").to(weight.dtype), weight)
            for name, weight in saved.weights.items()
        )
        ids = tokens(saved.model)
        with torch.inference_mode():
            expected = saved.model(input_ids=ids, use_cache=False).logits.float()
            plain = _plain(saved, make)(input_ids=ids, use_cache=False).logits.float()
        logits, scheme = logits_of(folder, ids)
        kv = checkpoint.quantised.kv if checkpoint.quantised else None
        scales = f", {len(kv.scales)} KV scales" if kv else ""
    error, effect = float((logits - expected).abs().mean()), float((plain - expected).abs().mean())
    size = float(expected.abs().mean())
    return (
        f"{found:>8}  {equal:>3} of {len(saved.weights):<3}  {error / size:8.1e}  "
        f"{effect / size:8.1e}   {scheme}{scales}"
    )


def _plain(saved: Saved, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The library's weights without any quantisation of activations."""
    model = make().float().eval()
    for name, weight in saved.weights.items():
        linears(model)[name].weight.data = weight.float()
    return model


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")
    chosen = sys.argv[1:] or list(CASES)
    print(f"{'model':9} {'case':20} {'library':>8}  {'equal weights':10} {'logits':>6}  {'effect':>8}   scheme")
    for name in chosen:
        for make in (demo, qwen3):
            try:
                line = compare(*CASES[name], make)
            except Exception as error:
                line = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            print(f"{make.__name__:9} {name:20} {line}", flush=True)


if __name__ == "__main__":
    main()
