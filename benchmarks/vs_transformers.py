"""ingot against transformers on this machine, same run, same text, same greedy tokens to produce.

    python benchmarks/vs_transformers.py [--model DIR] [--dtypes bfloat16,float32] [--rounds 5] [--json]

(a) One request at a time, against `model.generate` with its cache. (b) 32 requests of mixed prompt and output lengths,
against one left-padded batch `generate` (which runs until its longest request ends; only useful tokens are counted).
Each side has a process of its own, as it would have in use; they alternate, rounds are summarised by their median, and
beside them stands the floor: tokens/s if a decode step cost only its matrix products, as torch's F.linear does them.
Prompts are this project's own source files.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).parents[1]
Request = tuple[list[int], int]  # prompt tokens, tokens to generate


def prompts(tokenizer, num: int, low: int, high: int, seed: int) -> list[list[int]]:
    """`num` stretches of `low` to `high` tokens from the project's source files, each from another place."""
    rng = random.Random(seed)
    sources = [p for folder in ("engines", "builder", "plugins") for p in sorted((ROOT / folder).rglob("*.py"))]
    text = "\n".join(path.read_text() for path in sources)
    ids = tokenizer.encode(text, add_special_tokens=False)
    lengths = [rng.randint(low, high) for _ in range(num)]
    return [ids[start : start + n] for n in lengths for start in [rng.randrange(len(ids) - n)]]


@torch.inference_mode()
def run_transformers(model, requests: list[Request]) -> float:
    """Seconds of one left-padded batch generate, until the longest request has its tokens."""
    width = max(len(p) for p, _ in requests)
    ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in requests])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in requests])
    num_tokens = max(n for _, n in requests)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, use_cache=True,
                         pad_token_id=0, eos_token_id=None)  # fmt: skip
    seconds = time.perf_counter() - start
    assert out.shape[1] == width + num_tokens
    return seconds


def run_ingot(llm: LLM, requests: list[Request]) -> float:
    """Seconds of the same requests, in flight together."""
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n in requests]
    start = time.perf_counter()
    outputs = llm.generate([p for p, _ in requests], params, progress=False)
    seconds = time.perf_counter() - start
    assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in requests]
    return seconds


@torch.inference_mode()
def floor_ms(model, rows: int, repeats: int = 30) -> float:
    """Milliseconds of a decode step's matrix products alone: F.linear over every weight matrix of the model, median."""
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype) for w in weights}
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for w in weights:
            torch.nn.functional.linear(inputs[w.shape[1]], w)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[repeats // 5 :])


def serve_transformers(pipe: Connection, model_dir: str, dtype: str) -> None:
    """The other side: answers requests with seconds, a number of rows with their floor."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    pipe.send(None)
    while (order := pipe.recv()) is not None:
        pipe.send(floor_ms(model, order) if isinstance(order, int) else run_transformers(model, order))


def serve_ingot(pipe: Connection, engine: str) -> None:
    """Our side: first the seconds to open the engine, then those of each list of requests."""
    start = time.perf_counter()
    # no prefix cache: the rounds repeat the same prompts, and transformers computes them anew each time
    with LLM(engine, max_num_seqs=32, prefix_cache=False) as llm:
        pipe.send(time.perf_counter() - start)
        while (order := pipe.recv()) is not None:
            pipe.send(run_ingot(llm, order))


class Side:
    """A process that runs `serve`; calling it sends an order and waits for the answer."""

    def __init__(self, serve: Callable[..., None], *args: str):
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=serve, args=(end, *args), daemon=True)
        self._process.start()
        end.close()
        self.first = self._pipe.recv()

    def __call__(self, order: Any) -> float:
        self._pipe.send(order)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def compare(theirs: Side, ours: Side, batches: list[list[Request]], rounds: int, rows: int) -> dict[str, float]:
    """Useful tokens/s of both sides over `batches`, medians of alternating rounds, the first not counted."""
    useful = sum(n for batch in batches for _, n in batch)
    speeds: dict[Side, list[float]] = {theirs: [], ours: []}
    for round in range(rounds + 1):
        for side, speed in speeds.items():
            seconds = sum(side(batch) for batch in batches)
            if round:
                speed.append(useful / seconds)
    floor = theirs(rows)
    return {
        "transformers_tokens_per_s": statistics.median(speeds[theirs]),
        "ingot_tokens_per_s": statistics.median(speeds[ours]),
        "ratio": statistics.median(speeds[ours]) / statistics.median(speeds[theirs]),
        "ingot_lowest": min(speeds[ours]),
        "ingot_highest": max(speeds[ours]),
        "floor_ms_per_step": floor,
        "floor_tokens_per_s": 1000 * rows / floor,
    }


def measure(model_dir: str, dtype: str, rounds: int, work: Path) -> dict[str, dict[str, float]]:
    """All figures of one dtype, its engine built into `work`."""
    build_engine(BuildConfig(model=model_dir, out=str(work / dtype), dtype=dtype))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    single = [[(p, 96)] for p in prompts(tokenizer, 3, 48, 64, seed=0)]
    rng = random.Random(1)
    mixed = [[(p, rng.randint(16, 192)) for p in prompts(tokenizer, 32, 16, 384, seed=2)]]
    theirs, ours = Side(serve_transformers, model_dir, dtype), Side(serve_ingot, str(work / dtype))
    try:
        return {
            "open": {"seconds": ours.first},
            "one at a time": compare(theirs, ours, single, rounds, rows=1),
            "32 mixed": compare(theirs, ours, mixed, max(1, rounds // 2), rows=32),
        }
    finally:
        theirs.close()
        ours.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "engines/demo/pycoder-14m"))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = {d: measure(args.model, d, args.rounds, Path(work)) for d in args.dtypes.split(",")}
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "results": results}, indent=1))
        return
    print(f"{Path(args.model).name}, {torch.get_num_threads()} threads, torch {torch.__version__}; output tokens/s")
    heads = {"transformers": 14, "ingot": 10, "(lowest-highest)": 20, "ratio": 8, "floor": 10, "floor ms": 10}
    print(f"{'dtype':10}{'load':16}" + "".join(f"{head:>{width}}" for head, width in heads.items()))
    for dtype, loads in results.items():
        print(f"{dtype:10}{'open':16}{loads.pop('open')['seconds']:24.2f} s")
        for load, r in loads.items():
            spread = f"({r['ingot_lowest']:.0f}-{r['ingot_highest']:.0f})"
            print(f"{dtype:10}{load:16}{r['transformers_tokens_per_s']:14.0f}{r['ingot_tokens_per_s']:10.0f}{spread:>20}"
                  f"{r['ratio']:8.2f}{r['floor_tokens_per_s']:10.0f}{r['floor_ms_per_step']:10.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
