"""The products of a Llama-3.1-8B decode step on a GPU, as one CUDA graph: our tactics, cuBLAS, and the memory.

    python benchmarks/gpu_linear.py [--rows 1,4,16,64] [--layers 32] [--json FILE]

All weights of the model exist (15 GB in bf16), so none is in a cache when it is read. Each tactic of each shape is
timed over the weights of all layers, the fastest are put together. *Read*: the time in which torch sums as many bytes.
Milliseconds, medians of graph replays.
"""

import argparse
import json
from functools import partial

import torch
from gpu_timing import device, read_speed, replay_ms
from ingot.plugins import jit, tactics_of
from ingot.plugins.tactic import Device, Site, Tactic, Tensor

HIDDEN, INNER, QKV, VOCAB = 4096, 14336, 6144, 128256
LAYER = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}


def site_of(rows: int, shape: tuple[int, int], device: Device) -> Site:
    inputs = (Tensor((rows, shape[1]), "bfloat16"), Tensor(shape, "bfloat16"), None)
    return Site("Linear", {}, inputs, (Tensor((rows, shape[0]), "bfloat16"),), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json")
    args = parser.parse_args()
    gpu = device()
    weights = {name: [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(args.layers)]
               for name, shape in LAYER.items()}  # fmt: skip
    weights["head"] = [torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)]
    everything = [w for group in weights.values() for w in group]
    speed, num_bytes = read_speed(), sum(w.nbytes for w in everything)
    floor = num_bytes / speed * 1000
    name = torch.cuda.get_device_name()
    print(f"{name}: torch reads at {speed / 1e12:.2f} TB/s, {num_bytes / 1e9:.2f} GB in {floor:.2f} ms")
    workspace = torch.empty(64 << 20, device="cuda", dtype=torch.uint8)
    found: dict[str, dict] = {}
    for rows in map(int, args.rows.split(",")):
        best: dict[str, Tactic] = {}
        table: dict[str, list] = {}
        x = {w.shape[1]: torch.randn(rows, w.shape[1], device="cuda", dtype=torch.bfloat16) for w in everything}
        y = {w.shape[0]: torch.empty(rows, w.shape[0], device="cuda", dtype=torch.bfloat16) for w in everything}

        def call(tactic: Tactic, group: list[torch.Tensor], x: dict, y: dict) -> None:
            for w in group:
                jit.launch(tactic, (x[w.shape[1]], w, None), (y[w.shape[0]],), workspace)

        for name, group in weights.items():
            timed = [(replay_ms(partial(call, t, group, x, y), 7) / len(group), t)
                     for t in tactics_of("Linear")(site_of(rows, tuple(group[0].shape), gpu))]  # fmt: skip
            timed.sort(key=lambda pair: pair[0])
            best[name] = timed[0][1]
            table[name] = [(round(1000 * ms, 1), t.name) for ms, t in timed]
            gigabytes = group[0].nbytes / 1e9
            print(f"M={rows:3} {name:8} {timed[0][1].name:38}{1000 * timed[0][0]:8.1f} us "
                  f"{gigabytes / timed[0][0]:6.2f} TB/s  next {timed[1][1].name} {1000 * timed[1][0]:.1f}")  # fmt: skip

        def step(x: dict, y: dict, best: dict[str, Tactic]) -> None:
            for layer in range(args.layers):
                for name in LAYER:
                    call(best[name], weights[name][layer : layer + 1], x, y)
            call(best["head"], weights["head"], x, y)

        def theirs(x: dict) -> None:
            for w in everything:
                torch.nn.functional.linear(x[w.shape[1]], w)

        ours_ms, cublas_ms = replay_ms(partial(step, x, y, best)), replay_ms(partial(theirs, x))
        found[str(rows)] = {"ours": ours_ms, "cublas": cublas_ms, "read": floor, "tactics": table}
        print(f"M={rows:3} step: ours {ours_ms:.3f} ms, cuBLAS {cublas_ms:.3f}, read {floor:.3f}: "
              f"{num_bytes / ours_ms / 1e9:.2f} TB/s", flush=True)  # fmt: skip
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
