"""The native CPU kernels against torch and against the memory, on this machine.

    python benchmarks/cpu_kernels.py [--model engines/demo/pycoder-14m]

*Linear*: all products of one step over M tokens, every weight of the model once, so that nothing is in cache that would
not be in use; beside it torch's F.linear and the time that reading the weights takes. *PagedAttention*: one decode step
of S sequences through all layers, pages scattered; beside it the time that reading their keys and values takes.
Milliseconds, medians; the variants alternate.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ingot.plugins import OPS, native

ROWS = (1, 4, 8, 16, 32, 64, 128, 512)
SEQUENCES = ((1, 300), (8, 300), (32, 300), (4, 2000))
PAGE_SIZE = 16


def medians(variants: Mapping[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Milliseconds of each, alternating; the first fifth is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found[repeats // 5 :]) for name, found in times.items()}


def call_all(calls: Iterable[tuple]) -> None:
    """Each call is a function and its arguments."""
    for function, *arguments in calls:
        function(*arguments)


def read_speed(megabytes: int = 256) -> float:
    """Bytes per second of a sum over memory larger than the caches."""
    data = torch.ones(megabytes << 18)
    return data.nbytes / (medians({"sum": data.sum}, 10)["sum"] / 1000)


def linear_table(kernels: native.Kernels, config: dict[str, int], dtype: torch.dtype, speed: float) -> None:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = [((heads + 2 * kv_heads) * head, hidden), (hidden, heads * head), (2 * inner, hidden), (hidden, inner)]
    shapes = layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]
    weights = [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]
    runs = [kernels.binders["Linear"]({}, (None, weight, None)) for weight in weights]
    floor = 1000 * sum(weight.nbytes for weight in weights) / speed
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width).to(dtype) for width in {w.shape[1] for w in weights}}
        calls = [(run, inputs[weight.shape[1]], weight) for run, weight in zip(runs, weights, strict=True)]
        theirs = [(torch.nn.functional.linear, x, weight) for _, x, weight in calls]
        ms = medians({"native": partial(call_all, calls), "torch": partial(call_all, theirs)})
        flops = 2 * rows * sum(weight.numel() for weight in weights)
        print(f"{str(dtype)[6:]:9}{'M=' + str(rows):>14}{ms['native']:10.2f}{ms['torch']:10.2f}"
              f"{ms['torch'] / ms['native']:8.2f}{floor:10.2f}{flops / ms['native'] / 1e6:10.0f} GFLOP/s")  # fmt: skip


def attention_table(kernels: native.Kernels, config: dict[str, int], dtype: torch.dtype, speed: float) -> None:
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    attributes = dict(layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=dim,
                      scale=dim**-0.5, window=0, softcap=0.0)  # fmt: skip
    run = kernels.binders["PagedAttention"](attributes, (None,) * 10)
    reference = partial(OPS["PagedAttention"].reference, **attributes)
    for sequences, context in SEQUENCES:
        width = -(-context // PAGE_SIZE)
        shape = (sequences * width + 1, PAGE_SIZE, kv_heads, dim)
        pools = [[torch.randn(shape).to(dtype) for _ in "kv"] for _ in range(config["num_hidden_layers"])]
        pages = (torch.randperm(sequences * width) + 1).int().view(sequences, width)
        index = [pages[:, -1] * PAGE_SIZE + (context - 1) % PAGE_SIZE, torch.arange(sequences + 1),
                 torch.full((sequences,), context), pages]  # fmt: skip
        index = [tensor.int().contiguous() for tensor in index]
        query = torch.randn(sequences, (heads + 2 * kv_heads) * dim).to(dtype)
        calls = [(query, None, None, *index, k, v, None) for k, v in pools]
        ms = medians({"native": partial(call_all, [(run, *call) for call in calls]),
                      "torch": partial(call_all, [(reference, *call) for call in calls])})  # fmt: skip
        num_bytes = sequences * context * kv_heads * dim * 2 * dtype.itemsize * len(pools)
        print(f"{str(dtype)[6:]:9}{f'S={sequences} x {context}':>14}{ms['native']:10.2f}{ms['torch']:10.2f}"
              f"{ms['torch'] / ms['native']:8.2f}{1000 * num_bytes / speed:10.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "engines/demo/pycoder-14m")
    config = json.loads((parser.parse_args().model / "config.json").read_text())
    speed = read_speed()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, memory read at {speed / 1e9:.0f} GB/s")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        native.compile(Path(folder))
        kernels = native.load(Path(folder))
        if isinstance(kernels, native.Unavailable):
            raise SystemExit(kernels.reason)
        for name, table in (("Linear", linear_table), ("PagedAttention", attention_table)):
            print(f"\n{name:23}{'native ms':>10}{'torch ms':>10}{'ratio':>8}{'read ms':>10}")
            for dtype in (torch.float32, torch.bfloat16):
                table(kernels, config, dtype, speed)


if __name__ == "__main__":
    main()
