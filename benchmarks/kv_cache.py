"""What a KV cache in 8 bits costs and gives: perplexity and KV tokens of an engine with it, against bf16 pages.

    python benchmarks/kv_cache.py TEXT [--model engines/demo/pycoder-14m] [--windows 64] [--kinds fp8 int8]

Scales are calibrated on ingot's own sources, perplexity is over windows of TEXT, by the log-probabilities that the
engine gives for its prompts, which is the way they are served. KV tokens are those of 64 MiB.
"""

import argparse
import math
import tempfile
from pathlib import Path

from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.calibration.recipe import KV_CACHES
from ingot.engines.manifest import Manifest
from ingot.runtime.capacity import ServeConfig, num_kv_pages
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
WINDOW = 512


def measure(folder: Path, windows: list[list[int]]) -> tuple[float, int]:
    """Perplexity of the windows, and KV tokens."""
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(folder, prefix_cache=False) as llm:
        outputs = llm.generate(windows, scored, progress=False)
    sizes = ServeConfig(max_num_seqs=1, page_size=16, kv_cache_memory=64 << 20)
    capacity = 16 * (num_kv_pages(Manifest.open(folder), sizes) - 1)
    total = -sum(
        output.prompt_logprobs[i][window[i]].logprob
        for window, output in zip(windows, outputs, strict=True)
        for i in range(1, len(window))
    )
    return math.exp(total / sum(len(window) - 1 for window in windows)), capacity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=str(ROOT / "engines/demo/pycoder-14m"))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=[*KV_CACHES])
    args = parser.parse_args()
    tokens = Tokenizer.from_file(f"{args.model}/tokenizer.json").encode(args.text.read_text()).ids
    every = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - WINDOW, WINDOW)]
    windows = every[:: max(1, len(every) // args.windows)][: args.windows]
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "sources.txt"
        source.write_text("\n".join(path.read_text() for path in sorted((ROOT / "runtime").rglob("*.py"))))
        print(f"{len(windows)} windows of {WINDOW} tokens of {args.text}")
        first = 0.0
        for kind in ["", *args.kinds]:
            out = Path(work) / f"engine-{kind}"
            data = str(source) if kind else ""
            build_engine(BuildConfig(args.model, str(out), dtype="bfloat16", kv_cache=kind, calibration_data=data))
            perplexity, capacity = measure(out, windows)
            first = first or perplexity
            name, rise = kind or "bfloat16", 100 * (perplexity / first - 1)
            print(f"{name:10} perplexity {perplexity:.4f} ({rise:+.3f}%), {capacity} KV tokens in 64 MiB", flush=True)


if __name__ == "__main__":
    main()
