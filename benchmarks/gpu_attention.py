"""Attention of a Llama-3.1-8B decode step on a GPU against the memory: 32/8 heads of 128, pages of 16, bf16.

    python benchmarks/gpu_attention.py [--gigabytes 16]

Each tactic in a CUDA graph over several pools, so that no cache answers; the best is shown with the speed at which it
reads keys and values, beside the fastest that torch was seen to read in the same run.
"""

import argparse
from functools import partial

import torch
from gpu_timing import device, read_speed, replay_ms
from ingot.plugins import jit, tactics_of
from ingot.plugins.tactic import Site, Tactic, Tensor

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
CASES = [
    (1, 264),
    (16, 264),
    (64, 264),
    (256, 264),
    (1, 4096),
    (16, 4096),
    (1, 32768),
    (16, 32768),
    (1, 131072),
    (16, 131072),
]


def described(x: torch.Tensor | None) -> Tensor | None:
    return None if x is None else Tensor(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16, help="keys and values kept at least, over all pools")
    limit = parser.parse_args().gigabytes * 1e9
    gpu, speed = device(), read_speed()
    print(f"{torch.cuda.get_device_name()}: torch reads at {speed / 1e12:.2f} TB/s")
    attributes = dict(layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=DIM, scale=DIM**-0.5,
                      window=0, softcap=0.0)  # fmt: skip
    for sequences, context in CASES:
        width = -(-context // PAGE)
        num_pages, num_bytes = sequences * width + 1, 4 * sequences * context * KV_HEADS * DIM
        copies = max(2, min(32, int(limit // num_bytes)))
        pools = [torch.randn(2, num_pages, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
                 for _ in range(copies)]  # fmt: skip
        pages = (torch.randperm(num_pages - 1, device="cuda") + 1).int().view(sequences, width)
        step = [pages[:, -1] * PAGE + (context - 1) % PAGE, torch.arange(sequences + 1, device="cuda"),
                torch.full((sequences,), context, device="cuda"), pages]  # fmt: skip
        step = [tensor.int().contiguous() for tensor in step]
        query = torch.randn(sequences, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(sequences, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
        inputs = [query, None, None, *step, *pools[0], None]
        site = Site("PagedAttention", attributes, tuple(map(described, inputs)), (described(y),), gpu, max_query=1)

        def call(tactic: Tactic, pools: list, query: torch.Tensor, step: list, y: torch.Tensor) -> None:
            workspace = torch.empty(max(16, tactic.workspace), device="cuda", dtype=torch.uint8)
            for k, v in pools:
                jit.launch(tactic, [query, None, None, *step, k, v, None], [y], workspace)

        timed = [(replay_ms(partial(call, t, pools, query, step, y)) / copies, t.name)
                 for t in tactics_of("PagedAttention")(site)]  # fmt: skip
        timed.sort()
        (ms, name), (worst, other) = timed[0], timed[-1]
        print(f"{sequences:4} x {context:6} {1000 * ms:9.1f} us {num_bytes / ms / 1e9:6.2f} TB/s "
              f"{100 * num_bytes / ms * 1000 / speed:4.0f}%  {name}; "
              f"worst {other} {1000 * worst:.1f}", flush=True)  # fmt: skip
        del pools


if __name__ == "__main__":
    main()
