"""Are our GPTQ and AWQ as good as others'? Errors of the layers' outputs, on the same weights and the same text.

    python benchmarks/quantisers.py [--model DIR] [--tokens 8192] [--group 128] [--every 4] [--only AWQ]

The others are llmcompressor's GPTQ (with compressed-tensors' scales) and AutoAWQ's two searches; neither is needed by
ingot or its tests, and what is not installed is left out. They pin old versions of torch and transformers, so:

    pip install --no-deps llmcompressor compressed-tensors loguru datasets pyarrow dill multiprocess xxhash pandas \\
        psutil accelerate nvidia-ml-py
    pip download --no-deps autoawq && tar xf autoawq-*.tar.gz       # then PYTHONPATH=autoawq-0.2.9

Text is the sources of Python's own library, half to calibrate and the other half, held out, to measure. A figure is
||X (W - Q)^T|| / ||X W^T|| over all layers that read an input of that kind, as the root of the mean square.
"""

import argparse
import sysconfig
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from ingot.calibration.awq import search_clip, search_scales
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.gptq import Hessian, gptq
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS = ("qkv", "o", "gate_up", "down")


def others_gptq(weight: Tensor, x: Tensor, format: Format, act_order: bool) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = QuantizationArgs(
        num_bits=4,
        symmetric=format.symmetric,
        strategy="group",
        group_size=format.group,
        actorder="weight" if act_order else None,
    )
    groups = weight.unflatten(1, (-1, format.group))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    hessian = 2 * x.T @ x / len(x)
    return quantize_weight(weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, args)[0][0]


def others_awq(weight: Tensor, x: Tensor, format: Format) -> Tensor:
    from awq.quantize.quantizer import AwqQuantizer

    searcher = object.__new__(AwqQuantizer)  # its constructor wants a whole model
    searcher.w_bit, searcher.group_size, searcher.zero_point = 4, format.group, not format.symmetric
    searcher.duo_scaling, searcher.n_parallel_calib_samples, searcher.max_chunk_memory = True, None, 2**30
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    mean_abs = x.abs().mean(0)
    groups = weight.reshape(-1, format.group).abs()
    mean_weight = (groups / (groups.amax(1, keepdim=True) + 1e-6)).view_as(weight).mean(0)
    with torch.no_grad():
        s = searcher._compute_best_scale(x[None], mean_weight, mean_abs, layer, [layer], (x @ weight.T)[None], {})
        largest = searcher._compute_best_clip(weight * s, x / s)  # [N, K / group, 1]
        clipped = (weight * s).unflatten(1, (-1, format.group)).clamp(-largest, largest).flatten(1)
        return searcher.pseudo_quantize_tensor(clipped)[0] / s


def our_gptq(weight: Tensor, x: Tensor, format: Format, act_order: bool) -> Tensor:
    hessian = Hessian()
    hessian.update(x)
    return gptq(weight, hessian, format, act_order)[0].dequantise()


def our_clipped_gptq(weight: Tensor, x: Tensor, format: Format) -> Tensor:
    hessian = Hessian()
    hessian.update(x)
    return gptq(weight, hessian, format, act_order=True, clip=search_clip(weight, x, format))[0].dequantise()


def our_awq(weight: Tensor, x: Tensor, format: Format) -> Tensor:
    s = search_scales([weight], x, x.abs().mean(0), format)
    return round_to_nearest(weight * s, format, clip=search_clip(weight * s, x / s, format)).dequantise() / s


METHODS: dict[str, Callable[[Tensor, Tensor, Format], Tensor]] = {
    "round to nearest": lambda w, x, f: round_to_nearest(w, f).dequantise(),
    "GPTQ, llmcompressor": lambda w, x, f: others_gptq(w, x, f, False),
    "GPTQ, ingot": lambda w, x, f: our_gptq(w, x, f, False),
    "GPTQ act-order, llmcompressor": lambda w, x, f: others_gptq(w, x, f, True),
    "GPTQ act-order, ingot": lambda w, x, f: our_gptq(w, x, f, True),
    "AWQ, AutoAWQ": others_awq,
    "AWQ, ingot": our_awq,
    "clip and GPTQ act-order, ingot": our_clipped_gptq,
}


def layers(model: nn.Module, every: int) -> list[tuple[str, list[nn.Linear]]]:
    """The linear layers that share an input, by kind."""
    found = []
    for block in model.model.layers[::every]:
        attention, mlp = block.self_attn, block.mlp
        found.append(("qkv", [attention.q_proj, attention.k_proj, attention.v_proj]))
        found.append(("o", [attention.o_proj]))
        found.append(("gate_up", [mlp.gate_proj, mlp.up_proj]))
        found.append(("down", [mlp.down_proj]))
    return found


@torch.inference_mode()
def inputs_of(model: nn.Module, groups: list[tuple[str, list[nn.Linear]]], windows: Tensor) -> list[Tensor]:
    """What each group of layers reads of the windows [B, T]: [B * T, K] each."""
    seen: list[list[Tensor]] = [[] for _ in groups]

    def keep(to: list[Tensor]) -> Callable:
        return lambda module, arguments: to.append(arguments[0].flatten(0, 1))

    hooks = [m[0].register_forward_pre_hook(keep(to)) for (_, m), to in zip(groups, seen, strict=True)]
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(x) for x in seen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="engines/demo/pycoder-14m")
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate, and as many to measure")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--every", type=int, default=4, help="one block of the model in so many: AutoAWQ is slow on a CPU"
    )
    parser.add_argument("--only", default="", help="methods with this in their name")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    groups, texts = layers(model, arguments.every), []
    for half in (sources[::2], sources[1::2]):
        ids = [i for path in half for i in tokenizer.encode(path.read_text()[:4000])]
        texts.append(inputs_of(model, groups, torch.tensor(ids[: arguments.tokens // 512 * 512]).view(-1, 512)))
    for symmetric in (True, False):
        format = Format("int4", arguments.group, symmetric=symmetric)
        print(f"\nint4, groups of {format.group}, {'symmetric' if symmetric else 'with zero points'}: relative error")
        print(f"{'on held-out text (on the calibration text)':42}" + "".join(f"{kind:>18}" for kind in KINDS))
        for name, method in METHODS.items():
            if arguments.only not in name:
                continue
            errors = defaultdict(list)
            try:
                for (kind, members), seen, unseen in zip(groups, *texts, strict=True):
                    weight = torch.cat([m.weight.detach() for m in members])
                    delta = weight - method(weight, seen, format)
                    for x in (unseen, seen):
                        errors[kind, x is seen].append(float((x @ delta.T).norm() / (x @ weight.T).norm()) ** 2)
            except ImportError as missing:
                print(f"{name:42}  not installed ({missing})")
                continue
            mean = {key: (sum(e) / len(e)) ** 0.5 for key, e in errors.items()}
            print(f"{name:42}" + "".join(f"{mean[k, False]:9.4f} ({mean[k, True]:.4f})" for k in KINDS), flush=True)


if __name__ == "__main__":
    main()
