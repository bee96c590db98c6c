"""Attention of prompts on a GPU against its matrix products: 32/8 heads of 128 (Llama-3.1-8B), pages of 16, bf16.

    python benchmarks/gpu_prefill.py [--most 4]

A chunk of `new` tokens behind `past` of a prompt, each tactic in a CUDA graph (the write of K and V is part of it);
causal operations per second, beside those of torch's own attention on contiguous tensors in the same run.
"""

import argparse
from functools import partial

import torch
from gpu_attention import DIM, HEADS, KV_HEADS, PAGE, described
from gpu_timing import device, replay_ms
from ingot.plugins import jit, tactics_of
from ingot.plugins.tactic import Site, Tactic

CASES = [(128, 0), (1024, 0), (4096, 0), (512, 4096), (2048, 2048), (1024, 32768)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4, help="tactics shown of each case")
    most = parser.parse_args().most
    gpu = device()
    print(torch.cuda.get_device_name())
    attributes = dict(layer=0, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, v_head_dim=DIM, scale=DIM**-0.5,
                      window=0, softcap=0.0)  # fmt: skip
    for new, past in CASES:
        context = past + new
        width = -(-context // PAGE)
        k, v = (torch.randn(width + 1, PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        pages = (torch.randperm(width, device="cuda") + 1).int().view(1, width)
        positions = torch.arange(past, context, device="cuda")
        slots = pages[0, positions // PAGE] * PAGE + positions % PAGE
        step = [slots, torch.tensor([0, new], device="cuda"), torch.tensor([context], device="cuda"), pages]
        step = [tensor.int().contiguous() for tensor in step]
        query = torch.randn(new, (HEADS + 2 * KV_HEADS) * DIM, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(new, HEADS * DIM, device="cuda", dtype=torch.bfloat16)
        inputs = [query, None, None, *step, k, v, None]
        site = Site("PagedAttention", attributes, tuple(map(described, inputs)), (described(y),), gpu)

        def call(tactic: Tactic, inputs: list, y: torch.Tensor) -> None:
            jit.launch(tactic, inputs, [y], torch.empty(max(16, tactic.workspace), device="cuda", dtype=torch.uint8))

        flops = 4 * HEADS * DIM * (new * past + new * (new + 1) // 2)
        timed = sorted((replay_ms(partial(call, t, inputs, y)), t.name) for t in tactics_of("PagedAttention")(site))
        q, keys, values = (torch.randn(1, n, context, DIM, device="cuda", dtype=torch.bfloat16)
                           for n in (HEADS, KV_HEADS, KV_HEADS))  # fmt: skip
        attend = partial(torch.nn.functional.scaled_dot_product_attention, q, keys, values, is_causal=True,
                         enable_gqa=True)  # fmt: skip
        whole = 0.0 if past else flops / replay_ms(attend) / 1e9
        print(f"{new} behind {past}: torch {whole:.0f} TFLOP/s")
        for ms, name in timed[:most]:
            print(f"    {1000 * ms:8.1f} us {flops / ms / 1e9:6.0f} TFLOP/s  {name}", flush=True)


if __name__ == "__main__":
    main()
