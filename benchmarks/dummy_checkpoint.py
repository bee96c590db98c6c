"""Writes a checkpoint of a well-known shape with random weights, to measure with where no model can be downloaded.

    python benchmarks/dummy_checkpoint.py DIR [--shape llama-8b] [--layers N] [--hole]

The weights are one block of random bf16 numbers again and again: nothing is computed from them but time. With --hole
they are none, and take no room on the disk: for engines that are run with `--load-format dummy`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import transformers

SHAPES = {
    "llama-8b": (
        "LlamaConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16"},
    ),
    "llama-240m": (  # larger than the caches of a CPU, and quickly built
        "LlamaConfig",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16"},
    ),
}  # fmt: skip
BLOCK = 64 << 20  # bytes


def tensors(config: transformers.PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter."""
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="llama-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hole", action="store_true")
    args = parser.parse_args()
    class_name, sizes = SHAPES[args.shape]
    if args.layers:
        sizes["num_hidden_layers"] = args.layers
    config = getattr(transformers, class_name)(**sizes)
    config.architectures = [class_name.replace("Config", "ForCausalLM")]
    args.folder.mkdir(parents=True)
    config.save_pretrained(args.folder)
    header, end = {}, 0
    for name, shape in tensors(config).items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)
    numbers = np.random.default_rng(0).standard_normal(BLOCK // 2, np.float32) * 0.02
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # fp32 cut off to bf16
    with (args.folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for offset in range(0, 0 if args.hole else end, BLOCK):
            file.write(block[: min(BLOCK, end - offset)])
    print(f"{args.folder}: {end / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
