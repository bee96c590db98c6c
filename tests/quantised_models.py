"""Checkpoints in the formats of other quantisers, written here from how those formats are documented.

Numbers, scales and zero points are random, the packing is by loops over words, and what a weight stands for is computed
from them directly: none of it shares code with what reads it. `write` gives the checkpoint and transformers' model of
what it stands for.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

RNG = np.random.default_rng(0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # number AWQ_ORDER[i] of eight is in nibble i
Make = Callable[[str, int, int], tuple[dict[str, Tensor], Tensor]]  # name, rows, columns -> tensors, weight [N, K]


class Written(NamedTuple):
    """`model` is in float32 and has what the checkpoint's numbers stand for; `weights` are those of its Linears."""

    folder: Path
    model: PreTrainedModel
    weights: dict[str, Tensor]


def write(folder: Path, config: PretrainedConfig, make: Make, description: dict, skip=("lm_head",)) -> Written:
    """A random model whose Linears, but for those with a name that ends in one of `skip`, are made by `make`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
    stored, weights = dict(model.state_dict()), {}

    def quantise(name: str, parameter: Tensor) -> None:
        tensors, weights[name] = make(name, *parameter.shape)
        stored.update({f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()})
        parameter.copy_(weights[name])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(skip):
            del stored[f"{name}.weight"]
            quantise(name, module.weight.data)
        elif hasattr(module, "gate_up_proj"):  # experts [E, 2I, K] and [E, K, I], which are stored one by one
            del stored[f"{name}.gate_up_proj"], stored[f"{name}.down_proj"]
            for expert, (both, down) in enumerate(zip(module.gate_up_proj.data, module.down_proj.data, strict=True)):
                for kind, part in (*zip(("gate_proj", "up_proj"), both.chunk(2), strict=True), ("down_proj", down)):
                    quantise(f"{name}.{expert}.{kind}", part)
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors")
    fields = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": description}))
    return Written(folder, model, weights)


def change(folder: Path, change_config=None, change_tensors=None) -> None:
    """Edits a written checkpoint: functions that change its quantization_config, its tensors in place."""
    from safetensors.torch import load_file

    path = folder / "config.json"
    config = json.loads(path.read_text())
    if change_config:
        change_config(config["quantization_config"])
        path.write_text(json.dumps(config))
    if change_tensors:
        tensors = load_file(folder / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")


# -- packing -----------------------------------------------------------------------------------------------------------


def pack(numbers: np.ndarray, bits: int, order=None) -> Tensor:
    """[R, C] unsigned -> [R, ceil(C * bits / 32)] int32; number `order[i]` of each word's is its i-th from below."""
    per_word = 32 // bits
    rows, columns = numbers.shape
    words = np.zeros((rows, -(-columns // per_word)), np.uint32)
    for word in range(words.shape[1]):
        for i in range(per_word):
            column = word * per_word + (i if order is None else order[i])
            if column < columns:
                words[:, word] |= numbers[:, column].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def scales(*shape: int, dtype=torch.float16) -> Tensor:
    return torch.from_numpy(RNG.uniform(0.01, 0.03, shape)).to(dtype)


def weight_of(numbers: np.ndarray, scale: Tensor, zero: np.ndarray | int, group: np.ndarray) -> Tensor:
    """(numbers - zero) * scale; numbers [N, K], scale and zero [N, G], group [K] of each column."""
    zeros = np.broadcast_to(zero, scale.shape)
    return ((torch.from_numpy(numbers.astype(np.float32)) - torch.from_numpy(zeros.astype(np.float32))[:, group])
            * scale.float()[:, group])  # fmt: skip


# -- formats -----------------------------------------------------------------------------------------------------------


def gptq(bits=4, group=32, act_order=False, symmetric=False, version=1, shared_order=True, eight=()) -> Make:
    """With `act_order` columns are in random groups: those of the modules that read the same, or each its own.
    Modules whose names end in one of `eight` have 8 bits."""
    orders: dict[str, np.ndarray] = {}
    usual = bits

    def make(name: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        size, bits = group if group > 0 else columns, 8 if eight and name.endswith(eight) else usual
        index = np.arange(columns) // size
        if act_order:
            together = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
            reader = next((kinds for kinds in together if name.endswith(kinds)), name)
            block = f"{name.rpartition('.')[0]} {reader}" if shared_order else name
            index = orders.setdefault(block, RNG.permutation(index))
        numbers = RNG.integers(0, 2**bits, (rows, columns))
        zero = np.full((rows, columns // size), 2 ** (bits - 1))
        if not symmetric:
            zero = RNG.integers(0, 2**bits, zero.shape)
        scale = scales(*zero.shape)
        stored_zero = (zero - (version == 1)) % 2**bits
        return {
            "qweight": pack(numbers, bits).T, "qzeros": pack(stored_zero.T, bits), "scales": scale.T,
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }, weight_of(numbers, scale, zero, index)  # fmt: skip

    return make


def awq(group=32) -> Make:
    def make(name: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        numbers, zero = RNG.integers(0, 16, (rows, columns)), RNG.integers(0, 16, (rows, columns // group))
        scale = scales(*zero.shape)
        return {
            "qweight": pack(numbers.T, 4, AWQ_ORDER), "qzeros": pack(zero.T, 4, AWQ_ORDER), "scales": scale.T
        }, weight_of(numbers, scale, zero, np.arange(columns) // group)  # fmt: skip

    return make


def fp8_numbers(rows: int, columns: int) -> Tensor:
    return (torch.from_numpy(RNG.standard_normal((rows, columns))) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks(rows=32, columns=32, exponents=False, suffix="weight_scale_inv") -> Make:
    """Blocks at the edges may be cut off; `exponents`: scales are powers of two, E8M0 in bytes."""

    def make(name: str, num_rows: int, num_columns: int) -> tuple[dict[str, Tensor], Tensor]:
        numbers = fp8_numbers(num_rows, num_columns)
        shape = -(-num_rows // rows), -(-num_columns // columns)
        scale = scales(*shape, dtype=torch.float32) / 50
        stored = scale
        if exponents:
            power = torch.from_numpy(RNG.integers(-13, -8, shape))
            scale, stored = 2.0 ** power.float(), (power + 127).to(torch.uint8)
        spread = scale[torch.arange(num_rows) // rows][:, torch.arange(num_columns) // columns]
        return {"weight": numbers, suffix: stored}, numbers.float() * spread

    return make


def eight_bits(dtype="float", by="channel", static=False, symmetric=True, suffix="weight_scale",
               scale_dtype=torch.bfloat16) -> Make:  # fmt: skip
    """One scale for a tensor, or one for each row; int8 or FP8. Static: what the product reads has a scale too."""

    def make(name: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        number = RNG.integers(-128, 128, (rows, columns)).astype(np.int8)
        numbers = torch.from_numpy(number) if dtype == "int" else fp8_numbers(rows, columns)
        scale = scales(*((rows, 1) if by == "channel" else (1,)), dtype=scale_dtype) / 50
        tensors, zero = {"weight": numbers, suffix: scale}, torch.zeros(1)
        if not symmetric:
            zero = torch.from_numpy(RNG.integers(-20, 20, scale.shape).astype(np.int8))
            tensors["weight_zero_point"] = zero
        if static:  # what reads the same has one scale, but for v_proj
            tensors["input_scale"] = torch.tensor([0.05 if name.endswith("v_proj") else 0.06], dtype=scale_dtype)
        return tensors, (numbers.float() - zero.float()) * scale.float()

    return make


def packed(bits=4, group=32, symmetric=True, act_order=False) -> Make:
    """compressed-tensors' pack-quantized."""

    def make(name: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
        size = group if group > 0 else columns
        index = np.arange(columns) // size
        index = RNG.permutation(index) if act_order else index
        half = 2 ** (bits - 1)
        numbers = RNG.integers(-half, half, (rows, columns))
        zero = np.zeros((rows, columns // size), np.int64)
        tensors = {
            "weight_packed": pack(numbers + half, bits), "weight_shape": torch.tensor([rows, columns]),
            "weight_scale": scales(*zero.shape, dtype=torch.bfloat16),
        }  # fmt: skip
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
        if not symmetric:
            zero = RNG.integers(-half, half, zero.shape)
            tensors["weight_zero_point"] = pack((zero + half).T, bits).T
        return tensors, weight_of(numbers, tensors["weight_scale"], zero, index)

    return make


def group_config(form: str, weights: dict, activations: dict | None = None, **more) -> dict:
    """A quantization_config of compressed-tensors with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **more}
