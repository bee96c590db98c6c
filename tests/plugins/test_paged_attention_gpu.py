"""PagedAttention's tactics against the reference: on the GPU where there is one, interpreted otherwise."""

import itertools
import math
import os
import random

import pytest
import torch

pytest.importorskip("triton")

from ingot.plugins import OPS, jit, tactics_of
from ingot.plugins.tactic import Device, Site
from triton_run import DEVICE, described, poisoned

GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAGE_SIZE = 16


@pytest.fixture(autouse=True)
def fresh():
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    random.seed(seed)
    print("seed", seed)  # shown when a test fails


def compare(past, new, heads, kv_heads, dim, v_dim, dtype, *, packed=True, sinks=False, padding=0, **options):
    """Each tactic on sequences with a past in scattered pages; slots that no sequence owns hold NaN.

    padding: tokens, and for decoding sequences, that the bucket has more than there are.
    """
    lengths = [p + n for p, n in zip(past, new, strict=True)]
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    free = random.sample(range(1, sum(counts) + 4), sum(counts))
    decode = max(new) == 1
    sequences, tokens = len(past) + padding * decode, sum(new) + padding
    pools = [torch.full((sum(counts) + 4, PAGE_SIZE, kv_heads, n), math.nan, dtype=dtype) for n in (dim, v_dim)]
    pages = torch.zeros(sequences, max(counts) + 2, dtype=torch.int32)
    slots = torch.zeros(tokens, dtype=torch.int32)
    at = 0
    for s, length in enumerate(lengths):
        pages[s, : counts[s]] = torch.tensor([free.pop() for _ in range(counts[s])])
        place = pages[s, torch.arange(length) // PAGE_SIZE] * PAGE_SIZE + torch.arange(length) % PAGE_SIZE
        for pool in pools:
            flat = pool.view(-1, kv_heads, pool.shape[-1])
            flat[place[: past[s]]] = torch.randn(past[s], kv_heads, pool.shape[-1]).to(dtype)
        slots[at : at + new[s]] = place[past[s] :]
        at += new[s]
    starts = [0, *itertools.accumulate(new)]
    query_start = torch.tensor(starts + [starts[-1]] * (sequences - len(past)), dtype=torch.int32)
    kv_len = torch.tensor(lengths + [0] * (sequences - len(past)), dtype=torch.int32)
    q, k, v = (torch.randn(tokens, n).to(dtype) for n in (heads * dim, kv_heads * dim, kv_heads * v_dim))
    qkv = [torch.cat((q, k, v), 1), None, None] if packed else [q, k, v]
    sink = torch.randn(heads).to(dtype) if sinks else None
    attributes = dict(layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim, scale=dim**-0.5,
                      window=0, softcap=0.0) | options  # fmt: skip

    real = sum(new)
    expected_pools = [pool.clone() for pool in pools]
    expected = OPS["PagedAttention"].reference(
        *(None if x is None else x[:real] for x in qkv), slots[:real], query_start[: len(past) + 1],
        kv_len[: len(past)], pages[: len(past)], *expected_pools, sink, **attributes,
    )  # fmt: skip
    inputs = [*qkv, slots, query_start, kv_len, pages, *pools, sink]
    output = described(torch.empty(tokens, heads * v_dim, dtype=dtype, device="meta"))
    site = Site("PagedAttention", attributes, tuple(map(described, inputs)), (output,), Device(),
                max_query=1 if decode else None)  # fmt: skip
    found = tactics_of("PagedAttention")(site)
    assert found
    for tactic in found[: None if GPU else 2]:
        given = [None if x is None else x.to(DEVICE).clone() for x in inputs]
        y = poisoned(output.shape, output.dtype)
        workspace = torch.full((max(tactic.workspace, 16),), 0xFF, dtype=torch.uint8, device=DEVICE)
        jit.launch(tactic, given, [y], workspace)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(y[:real].cpu(), expected, rtol=tolerance, atol=tolerance,
                                   msg=lambda m, t=tactic: f"{t.name}: {m}")  # fmt: skip
        for ours, theirs in zip(given[7:9], expected_pools, strict=True):  # page 0 is scratch
            torch.testing.assert_close(ours[1:].cpu(), theirs[1:], rtol=0, atol=0, equal_nan=True)
    return found


DIMS = [(6, 2, 64, 64), (3, 1, 24, 40)]
if GPU:
    DIMS += [(32, 8, 128, 128), (8, 8, 80, 80), (4, 1, 96, 96), (8, 4, 256, 256), (64, 8, 64, 64)]
OPTIONS = [{}, {"window": 20}, {"softcap": 2.0, "sinks": True}, {"packed": False, "window": 33, "sinks": True}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim,v_dim", DIMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decoding(dtype, heads, kv_heads, dim, v_dim, options):
    past = [70, 0, 33] if not GPU else [700, 0, 33, 4000, 15, 16]
    compare(past, [1] * len(past), heads, kv_heads, dim, v_dim, dtype, padding=1, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim,v_dim", DIMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prompts_and_decoding_mixed(dtype, heads, kv_heads, dim, v_dim, options):
    past, new = ([0, 40, 17], [21, 1, 9]) if not GPU else ([0, 100, 17, 0, 250, 63], [300, 1, 5, 1, 77, 1])
    compare(past, new, heads, kv_heads, dim, v_dim, dtype, padding=3, **options)


def test_keys_of_few_sequences_are_split():
    names = [t.name for t in compare([600], [1], 2, 1, 16, 16, torch.float32)]
    assert all("splits3" in name for name in names)


def test_a_full_gpu_splits_nothing():
    x = described(torch.empty(512, 640, dtype=torch.float16, device="meta"))
    step = [described(torch.empty(n, dtype=torch.int32, device="meta")) for n in (512, 513, 512, (512, 8))]
    pool = described(torch.empty(9, 16, 2, 64, dtype=torch.float16, device="meta"))
    attributes = dict(layer=0, num_heads=6, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=1.0, window=0, softcap=0)
    site = Site("PagedAttention", attributes, (x, None, None, *step, pool, pool, None), (x,), max_query=1)
    assert all(len(t.launches) == 2 and not t.workspace for t in tactics_of("PagedAttention")(site))
