"""Writes a small checkpoint of a decoder family (`tests/families.py`) with random weights that all matter, in bf16.

    python benchmarks/random_checkpoint.py FAMILY DIR

Weights are large (initializer range 0.2; biases, norms and sinks perturbed), so that positions, windows, norm offsets
and the choice of experts all change the tokens. It has no tokenizer: `benchmarks/gpu_accuracy.py` gives such engines
random tokens.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from families import FAMILIES  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = FAMILIES[args.family]()
    config.initializer_range = 0.2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.bfloat16().save_pretrained(args.folder)
    print(f"{args.folder}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
