"""How much worse does each recipe make a model? Against its own bf16 engine, on text that no calibration saw.

    python benchmarks/quantised_accuracy.py [RECIPE ..] [--model DIR] [--text FILE] [--calibration FILE] [--tokens N]

Builds an engine of the model as it is and one with each recipe (all of ingot's without names), opens their files and
runs the graphs in them over the text, cut into windows of 512 tokens, with the reference ops: what a target's kernels
add to it is not in these figures. Calibration text is this project's own source, unless another is given.
Size is that of the weights in the file. `bound` is by how much the recipe lets perplexity rise.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from ingot import BuildConfig, build_engine
from ingot.builder.calibration_text import WIDTH
from ingot.builder.node_major import Windows, run
from ingot.calibration.accuracy import compare
from ingot.calibration.recipe import Recipe, recipes
from ingot.engines.weights import WEIGHTS_FILE, load_graph
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
FOLDERS = ("builder", "calibration", "engines", "plugins", "runtime")


def windows_of(path: Path, model: Path, num_tokens: int) -> list[Windows]:
    """The first tokens of a text, four windows in a step."""
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(path.read_text(encoding="utf-8")).ids[:num_tokens]
    tokens = torch.tensor(ids[: len(ids) // WIDTH * WIDTH], dtype=torch.int32).view(-1, WIDTH)
    return [Windows(part) for part in tokens.split(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="names or YAML files; none: all of ingot's that need no search")
    parser.add_argument("--model", type=Path, default=ROOT / "engines/demo/pycoder-14m")
    parser.add_argument("--text", type=Path, required=True, help="held out: what the engines are compared on")
    parser.add_argument("--calibration", type=Path, help="text to calibrate with")
    parser.add_argument("--tokens", type=int, default=32768, help="to compare on")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    arguments = parser.parse_args()
    names = arguments.recipes or [recipe.name for recipe in recipes()]
    text = windows_of(arguments.text, arguments.model, arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.calibration or Path(folder) / "source.txt"
        if not arguments.calibration:
            files = [file for name in FOLDERS for file in sorted((ROOT / name).rglob("*.py"))]
            source.write_text("\n".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
        engine = Path(folder) / "engine"
        build_engine(BuildConfig(str(arguments.model), str(engine), dtype="bfloat16"))
        before, whole = list(run(load_graph(engine), text)), (engine / WEIGHTS_FILE).stat().st_size
        print(f"{'recipe':14}{'perplexity':>11}{'change':>9}{'bound':>8}{'KL':>9}{'top-1':>9}{'MB':>8}{'built':>8}")
        tokens = [windows.tokens for windows in text]
        same = compare(before, before, tokens)
        print(f"{'bfloat16':14}{same.perplexity:11.4f}{'':>26}{'':>9}{whole / 1e6:8.2f}", flush=True)
        for name in names:
            start = time.perf_counter()
            build_engine(BuildConfig(
                str(arguments.model), str(engine), dtype="bfloat16", force=True, quant=name, accept_accuracy=True,
                calibration_data=str(source), calibration_tokens=arguments.calibration_tokens,
            ))  # fmt: skip
            seconds, found = time.perf_counter() - start, compare(before, list(run(load_graph(engine), text)), tokens)
            print(
                f"{name:14}{found.perplexity:11.4f}{100 * found.rise:+8.2f}%{100 * Recipe.open(name).perplexity:7.1f}%"
                f"{found.kl:9.5f}{100 * found.top1:8.2f}%{(engine / WEIGHTS_FILE).stat().st_size / 1e6:8.2f}"
                f"{seconds:7.0f}s", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
