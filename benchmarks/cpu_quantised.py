"""Quantised weights on the CPU target against bf16, on this machine, in the same run.

    python benchmarks/cpu_quantised.py kernels                      # products of the shapes of two models
    python benchmarks/cpu_quantised.py engines CHECKPOINT           # tokens/s and memory of whole engines

*kernels*: y = x W^T with as many weights of a shape as exceed the caches (`--cached`: one, which stays there), by the
bf16 Linear kernel and by QuantisedLinear: milliseconds, the ratio to bf16, and of one row the bytes of weights read in
a second beside the ceiling, which is a sum over memory. w8a8 includes the quantisation of x.
*engines*: CHECKPOINT (as `benchmarks/dummy_checkpoint.py` writes it) in bf16 and by recipes, each in a process of its
own, decoding greedily; the memory is what the process holds more than before it opened the engine, KV pool aside.
Figures are the best of several rounds in which the variants alternate: other work on the machine only adds time.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from ingot.plugins import native
from ingot.plugins.dtypes import TORCH_DTYPES

SHAPES = {  # [N, K]
    "pycoder-14m": {"qkv": (640, 384), "o": (384, 384), "gate_up": (2048, 384), "down": (384, 1024)},
    "8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
ROWS = (1, 4, 16, 64, 256)
BEYOND_CACHES = 200e6  # bytes of bf16
BF16, INT8 = (next(n for n, d in TORCH_DTYPES.items() if d is dtype) for dtype in (torch.bfloat16, torch.int8))
Product = Callable[[torch.Tensor], Any]


def best(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, the least of `rounds`, alternating."""
    times = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def products(kernels: native.Kernels, width: int, depth: int) -> dict[str, tuple[Product, int]]:
    """A product with fresh random weights in each format, and the bytes of weights and scales that it reads."""
    bind, tokens = kernels.binders["QuantisedLinear"], kernels.binders["QuantiseTokens"]
    weight = torch.randn(width, depth).bfloat16()
    linear = kernels.binders["Linear"]({}, (None, weight, None))
    packed = torch.randint(0, 256, (width, depth // 2), dtype=torch.uint8)
    numbers = torch.randint(-128, 128, (width, depth), dtype=torch.int8)
    grouped, scale = torch.rand(width, depth // 128), torch.rand(width)
    four = bind(dict(dtype=BF16, group=128, x_group=0), (None, packed, grouped, None, None, None))
    eight = bind(dict(dtype=BF16, group=0, x_group=0), (None, numbers, scale, None, None, None))
    in_bytes = tokens(dict(dtype=INT8, group=0), (None,))
    assert linear and four and eight and in_bytes

    def w8a8(x: torch.Tensor) -> Any:
        values, x_scale = in_bytes(x)
        return eight(values, numbers, scale, None, x_scale)

    return {
        "bf16": (lambda x: linear(x, weight), weight.nbytes),
        "int4": (lambda x: four(x, packed, grouped), packed.nbytes + grouped.nbytes),
        "int8": (lambda x: eight(x, numbers, scale), numbers.nbytes + scale.nbytes),
        "w8a8": (w8a8, numbers.nbytes + scale.nbytes),
    }


def call_all(runs: list[Product], x: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        for run in runs:
            run(x)

    return call


def kernel_table(args: argparse.Namespace) -> None:
    data = torch.ones(64 << 20)
    speed = data.nbytes / best({"sum": data.sum}, 10)["sum"]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, memory read at {speed / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        native.compile(Path(folder))
        kernels = native.load(Path(folder))
        if isinstance(kernels, native.Unavailable):
            raise SystemExit(kernels.reason)
        for model in args.models:
            for name, (width, depth) in SHAPES[model].items():
                num = 1 if args.cached else max(1, round(BEYOND_CACHES / (2 * width * depth)))
                sets = [products(kernels, width, depth) for _ in range(num)]
                for rows in ROWS:
                    x = torch.randn(rows, depth).bfloat16()
                    calls = {kind: call_all([each[kind][0] for each in sets], x) for kind in sets[0]}
                    seconds = {kind: found / num for kind, found in best(calls, args.rounds).items()}
                    line = f"{model:12}{name:8}{f'{width} x {depth}':>14}{rows:5} rows"
                    for kind, found in seconds.items():
                        line += f"{kind:>7}{1000 * found:9.3f} ms {seconds['bf16'] / found:5.2f}x"
                        if rows == 1:
                            line += f" {sets[0][kind][1] / found / 1e9:4.0f} GB/s"
                    print(line, flush=True)


def cast(checkpoint_path: str, out: Path, recipe: str) -> int:
    """An engine, by rounding to the nearest and without the check of its accuracy; bytes of its weights."""
    from ingot import BuildConfig
    from ingot.builder.checkpoint import Checkpoint
    from ingot.builder.export import export
    from ingot.builder.passes import optimise
    from ingot.builder.quantise import quantise
    from ingot.builder.record import kv_layers, model_info
    from ingot.builder.targets import target_of
    from ingot.builder.text_files import copy_text_files
    from ingot.calibration.recipe import Recipe
    from ingot.calibration.scales import Scales
    from ingot.engines.manifest import BuildRecord, Manifest
    from ingot.engines.weights import WEIGHTS_FILE, save_graph
    from ingot.engines.writer import engine_directory

    checkpoint = Checkpoint.open(checkpoint_path)
    with target_of("cpu").begin(BuildConfig(checkpoint_path, str(out))) as compile:
        graph = optimise(export(checkpoint, torch.bfloat16))
        if recipe != "bf16":
            quantise(graph, Recipe.open(recipe), Scales())
        with engine_directory(out) as folder:
            save_graph(graph, folder)
            copy_text_files(checkpoint.path, folder)
            model = model_info(checkpoint_path, checkpoint, graph, "bfloat16")
            info = compile(graph, model, folder)
            Manifest(model, kv_layers(graph), "cpu", info, BuildRecord("", 0.0)).save(folder)
    return (out / WEIGHTS_FILE).stat().st_size


def resident() -> int:
    """Bytes of memory that this process holds, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def serve(engine: Path, tokens: int, parent: Connection) -> None:
    """In a process of its own: for each batch size that comes, decode and send back tokens/s and the memory."""
    from ingot import LLM, SamplingParams

    before = resident()
    with LLM(engine, prefix_cache=False, max_num_seqs=16, kv_cache_memory=64 << 20) as llm:
        while batch := parent.recv():
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            start = time.perf_counter()
            llm.generate([[i + 3, 5, 8, 13] for i in range(batch)], params, progress=False)
            parent.send((batch * tokens / (time.perf_counter() - start), resident() - before))


def engine_table(args: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        pipes, sizes = {}, {}
        for recipe in ("bf16", *args.recipes):
            sizes[recipe] = cast(args.checkpoint, Path(scratch) / recipe, recipe)
            pipes[recipe], end = spawn.Pipe()
            spawn.Process(target=serve, args=(Path(scratch) / recipe, args.tokens, end), daemon=True).start()
        for batch in args.batches:
            most, memory = dict.fromkeys(pipes, 0.0), dict.fromkeys(pipes, 0)
            for _ in range(args.rounds + 1):  # the first reads the weights from the disk
                for recipe, pipe in pipes.items():
                    pipe.send(batch)
                    speed, memory[recipe] = pipe.recv()
                    most[recipe] = max(most[recipe], speed)
            for recipe, speed in most.items():
                print(
                    f"batch {batch:3}  {recipe:10}{speed:9.1f} tokens/s {speed / most['bf16']:5.2f}x   weights "
                    f"{sizes[recipe] / 1e6:7.0f} MB, held {memory[recipe] / 1e6:7.0f} MB",
                    flush=True,
                )
        for pipe in pipes.values():
            pipe.send(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    commands = parser.add_subparsers(required=True)
    kernels = commands.add_parser("kernels")
    kernels.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    kernels.add_argument("--cached", action="store_true")
    kernels.set_defaults(run=kernel_table)
    engines = commands.add_parser("engines")
    engines.add_argument("checkpoint")
    engines.add_argument("--recipes", nargs="+", default=["w8a16", "int4-rtn"])
    engines.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    engines.add_argument("--tokens", type=int, default=32)
    engines.add_argument("--scratch", help="where engines are written meanwhile")
    engines.set_defaults(run=engine_table)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
