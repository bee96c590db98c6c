"""Attention that verifies drafts, as chains and as trees: is it right, and what does the mask of a tree cost?

    python benchmarks/gpu_trees.py [--seconds 120]

Sizes of Llama-3.1-8B: 32/8 heads of 128, pages of 16, bf16. Each row: sequences x keys, queries of each; the best
tactic's time without a mask and with one, in a CUDA graph over several pools, so that no cache answers; and the error
against the reference, of the tree with the tactic that was best. Rows are left out once the time is up.
"""

import argparse
import random
import time
from functools import partial

import torch
from gpu_attention import DIM, HEADS, KV_HEADS, PAGE, described
from gpu_timing import device, replay_ms
from ingot.plugins import OPS, jit, tactics_of
from ingot.plugins.tactic import Site, Tactic
from ingot.runtime.speculation.tree import Tree

CASES = [
    (1, 264, 8),
    (1, 264, 16),
    (1, 264, 32),
    (4, 264, 8),
    (4, 264, 16),
    (1, 4096, 16),
    (4, 4096, 16),
    (1, 32768, 16),
]
CASES += [(16, 264, 8), (16, 4096, 8)]
ATTRIBUTES = dict(layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=DIM, scale=DIM**-0.5,
                  window=0, softcap=0.0)  # fmt: skip
KEPT = 2e9  # bytes of keys and values over all pools


def random_tree(num: int, rng: random.Random) -> Tree:
    parents = [rng.randrange(-1, i) for i in range(num)]
    return Tree(range(num), parents)


def call(tactic: Tactic, pools: list, inputs: list, y: torch.Tensor) -> None:
    workspace = torch.empty(max(16, tactic.workspace), device="cuda", dtype=torch.uint8)
    for k, v in pools:
        jit.launch(tactic, [*inputs[:7], k, v, *inputs[9:]], [y], workspace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    until, gpu, rng = time.monotonic() + parser.parse_args().seconds, device(), random.Random(0)
    print(f"{torch.cuda.get_device_name()}\n{'sequences x keys, queries':>28} {'chain':>9} {'tree':>9} {'error':>9}")
    for sequences, context, queries in CASES:
        if time.monotonic() > until:
            break
        width, num = -(-context // PAGE), sequences * queries
        num_pages, num_bytes = sequences * width + 1, 4 * sequences * context * KV_HEADS * DIM
        pools = [torch.randn(2, num_pages, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
                 for _ in range(max(2, min(32, int(KEPT // num_bytes))))]  # fmt: skip
        pages = (torch.randperm(num_pages - 1, device="cuda") + 1).int().view(sequences, width)
        at = torch.arange(context - queries, context, device="cuda")
        slots = (pages[:, at // PAGE] * PAGE + at % PAGE).flatten()
        step = [slots, torch.arange(sequences + 1, device="cuda") * queries,
                torch.full((sequences,), context, device="cuda"), pages]  # fmt: skip
        bits = [[-1, *random_tree(queries - 1, rng).ancestors().tolist()] for _ in range(sequences)]
        ancestors = torch.tensor(bits, dtype=torch.int32, device="cuda").flatten()
        query = torch.randn(num, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(num, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
        best = []
        for told in (None, ancestors):
            inputs = [query, None, None, *(x.int().contiguous() for x in step), *pools[0], None, None, None, told]
            site = Site("PagedAttention", ATTRIBUTES, tuple(map(described, inputs)), (described(y),), gpu, queries)
            timed = [(replay_ms(partial(call, tactic, pools, inputs, y)) / len(pools), tactic.name, tactic)
                     for tactic in tactics_of("PagedAttention")(site)]  # fmt: skip
            best.append(min(timed, key=lambda one: one[0]))
        copies = [None if x is None else x.cpu().float() if x.is_floating_point() else x.cpu() for x in inputs]
        wanted = OPS["PagedAttention"].reference(*copies, **ATTRIBUTES)
        call(best[1][2], pools[:1], inputs, y.fill_(float("nan")))
        error = (y.cpu().float() - wanted).abs().max()
        print(f"{f'{sequences} x {context}, {queries}':>28} {1000 * best[0][0]:6.1f} us {1000 * best[1][0]:6.1f} us"
              f" {error:9.4f}  {best[0][1]}; {best[1][1]}", flush=True)  # fmt: skip
        assert error < 0.03, "the tree's attention differs from the reference"
        del pools


if __name__ == "__main__":
    main()
