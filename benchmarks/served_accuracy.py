"""What recipes and a KV cache in 8 bits cost and give, as they are served: perplexity of engines against the bf16 one.

    python benchmarks/served_accuracy.py TEXT [--target cuda] [--recipes fp8 int4-awq ..] [--kinds fp8 int8 ..]

Scales are calibrated on ingot's own sources, perplexity is over windows of TEXT, by the log-probabilities that the
engine gives for its prompts, which is the way they are served: by the target's kernels. KV tokens are those of 64 MiB.
Engines are built `--jobs` at a time, for the GPU without timing. The exit status is the number of recipes and
caches of which no engine could be built or run.
"""

import argparse
import math
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.calibration.recipe import KV_CACHES
from ingot.engines.manifest import Manifest
from ingot.runtime.capacity import ServeConfig, num_kv_pages
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
WINDOW = 512


def build(config: BuildConfig, name: str, quant: str = "", kv_cache: str = "") -> Path:
    """The engine with a recipe, a KV cache, or neither, beside that of `config`."""
    out = Path(config.out) / name
    accept = bool(quant or kv_cache)  # whatever it costs, which is what is measured
    if not accept:
        config = replace(config, calibration_data="", calibration_tokens=BuildConfig.calibration_tokens)
    build_engine(replace(config, out=str(out), quant=quant, kv_cache=kv_cache, accept_accuracy=accept))
    return out


def measure(folder: Path, windows: list[list[int]]) -> tuple[float, int]:
    """Perplexity of the windows, and KV tokens."""
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(folder, prefix_cache=False, num_kv_pages=2 + 8 * -(-(WINDOW + 1) // 16)) as llm:
        outputs = llm.generate(windows, scored, progress=False)
    sizes = ServeConfig(max_num_seqs=1, page_size=16, kv_cache_memory=64 << 20)
    capacity = 16 * (num_kv_pages(Manifest.open(folder), sizes) - 1)
    total = -sum(
        output.prompt_logprobs[i][window[i]].logprob
        for window, output in zip(windows, outputs, strict=True)
        for i in range(1, len(window))
    )
    return math.exp(total / sum(len(window) - 1 for window in windows)), capacity


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=str(ROOT / "engines/demo/pycoder-14m"))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--recipes", nargs="*", default=[])
    parser.add_argument("--kinds", nargs="*", default=[*KV_CACHES])
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    tokens = Tokenizer.from_file(f"{args.model}/tokenizer.json").encode(args.text.read_text()).ids
    every = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - WINDOW, WINDOW)]
    windows = every[:: max(1, len(every) // args.windows)][: args.windows]
    with (
        tempfile.TemporaryDirectory() as work,
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as workers,
    ):
        source = Path(work) / "sources.txt"
        source.write_text("\n".join(path.read_text() for path in sorted((ROOT / "runtime").rglob("*.py"))))
        sizes = {} if args.target == "cpu" else {"max_num_seqs": 8, "max_num_batched_tokens": WINDOW}
        config = BuildConfig(args.model, work, target=args.target, tune=False, dtype="bfloat16", **sizes,
                             calibration_data=str(source), calibration_tokens=args.calibration_tokens)  # fmt: skip
        start = partial(workers.submit, build, config)
        plain = start("bfloat16")
        engines = [(Path(name).stem, start(Path(name).stem, quant=name)) for name in args.recipes]
        engines += [(f"{kind} KV cache", start(f"kv-{kind}", kv_cache=kind)) for kind in args.kinds]
        print(f"{len(windows)} windows of {WINDOW} tokens of {args.text}, target {args.target}")
        first, capacity = measure(plain.result(), windows)  # without it there is nothing to compare with
        print(f"{'bfloat16':22} perplexity {first:.4f}, {capacity} KV tokens in 64 MiB", flush=True)
        failed = 0
        for name, engine in engines:
            try:
                perplexity, capacity = measure(engine.result(), windows)
            except Exception as error:  # the others are worth their time
                failed += 1
                print(f"{name:22} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            rise = 100 * (perplexity / first - 1)
            print(f"{name:22} perplexity {perplexity:.4f} ({rise:+.3f}%), {capacity} KV tokens in 64 MiB", flush=True)
        return failed


if __name__ == "__main__":
    sys.exit(main())
