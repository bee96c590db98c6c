"""PagedAttention against a naive float64 attention over each sequence's own contiguous keys and values.

Every slot that no sequence owns, and every page-table entry that must not be read, is poisoned.
"""

import math
import random

import pytest
import torch
from ingot.engines.errors import EngineError
from ingot.plugins import OPS
from random_tree import bits_of, path_to, random_parents

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAGE_SIZE = 4


def naive(q, k, v, scale, window=0, softcap=0.0, sinks=None):
    """q [n, H, D] at the end of k [L, Hkv, D], v [L, Hkv, Dv] -> [n, H, Dv]; float64, one score at a time."""
    n, num_heads, length = q.shape[0], q.shape[1], k.shape[0]
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros(n, num_heads, v.shape[-1], dtype=torch.float64)
    for j in range(n):
        position = length - n + j
        first = max(0, position - window + 1) if window else 0
        for h in range(num_heads):
            kv = h * k.shape[1] // num_heads
            scores = k[first : position + 1, kv] @ q[j, h] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else math.exp(float(sinks[h])))
            y[j, h] = (weights / total) @ v[first : position + 1, kv]
    return y


class Pool:
    """Sequences with a past, in scattered pages of a pool full of NaN."""

    def __init__(self, past, new, *, heads, kv_heads, dim, v_dim, dtype, seed):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        lengths = [p + n for p, n in zip(past, new, strict=True)]
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        num_pages = sum(counts) + 5
        free = rng.sample(range(1, num_pages), num_pages - 1)
        self.dims = dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim)
        self.k_pages = torch.full((num_pages, PAGE_SIZE, kv_heads, dim), math.nan, dtype=dtype)
        self.v_pages = torch.full((num_pages, PAGE_SIZE, kv_heads, v_dim), math.nan, dtype=dtype)
        self.pages = torch.zeros(len(past), max(counts) + 2, dtype=torch.int32)
        self.kv_len = torch.tensor(lengths, dtype=torch.int32)
        self.query_start = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        self.keys, self.values, self.queries, slots = [], [], [], []
        for s, length in enumerate(lengths):
            table = [free.pop() for _ in range(counts[s])]
            self.pages[s, : counts[s]] = torch.tensor(table, dtype=torch.int32)
            place = torch.tensor([table[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in range(length)])
            k = torch.randn(length, kv_heads, dim, generator=g).to(dtype)
            v = torch.randn(length, kv_heads, v_dim, generator=g).to(dtype)
            self.k_pages.view(-1, kv_heads, dim)[place[: past[s]]] = k[: past[s]]
            self.v_pages.view(-1, kv_heads, v_dim)[place[: past[s]]] = v[: past[s]]
            self.keys.append(k)
            self.values.append(v)
            self.queries.append(torch.randn(new[s], heads, dim, generator=g).to(dtype))
            slots.append(place[past[s] :])
        self.slots = torch.cat(slots).int()
        self.new = new

    def run(self, *, packed, **options):
        tail = [x[len(x) - n :] for x, n in zip(self.keys, self.new, strict=True)]
        v_tail = [x[len(x) - n :] for x, n in zip(self.values, self.new, strict=True)]
        q, k, v = (torch.cat(parts).flatten(1) for parts in (self.queries, tail, v_tail))
        q, k, v = (torch.cat((q, k, v), 1), None, None) if packed else (q, k, v)
        attention = OPS["PagedAttention"].reference
        return attention(
            q, k, v, self.slots, self.query_start, self.kv_len, self.pages, self.k_pages, self.v_pages,
            options.pop("sinks", None), layer=0, **self.dims, **options,
        )  # fmt: skip

    def expected(self, **options):
        each = zip(self.queries, self.keys, self.values, strict=True)
        return torch.cat([naive(q, k, v, **options) for q, k, v in each]).flatten(1)


MIXES = {
    "prefill": ([0], [13]),
    "chunk": ([9], [6]),
    "one": ([10], [1]),
    "first": ([0], [1]),
    "decode": ([0, 3, 30, 7, 4, 200, 15], [1] * 7),
    "mixed": ([0, 17, 5, 8, 0, 22], [7, 1, 1, 4, 3, 4]),
    "absent": ([3, 8, 5], [2, 0, 1]),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"softcap": 3.0}, {"sinks": True}, {"window": 3, "softcap": 2.0, "sinks": True}],
    ids=["plain", "window", "softcap", "sinks", "all"],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive_attention(mix, options, dtype):
    past, new = MIXES[mix]
    pool = Pool(past, new, heads=6, kv_heads=2, dim=10, v_dim=10, dtype=dtype, seed=torch.initial_seed())
    options = {"scale": 0.3, **options}
    if "sinks" in options:
        options["sinks"] = torch.randn(6).to(dtype)
    y = pool.run(packed=mix != "chunk", **options)
    assert y.dtype == dtype
    assert (y.double() - pool.expected(**options)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("heads, kv_heads, dim, v_dim", [(4, 4, 12, 7), (5, 1, 8, 8), (3, 3, 6, 9), (8, 2, 16, 4)])
def test_head_shapes(heads, kv_heads, dim, v_dim):
    past, new = MIXES["mixed"]
    pool = Pool(past, new, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=v_dim, dtype=torch.float32, seed=1)
    for packed in (True, False):
        y = pool.run(packed=packed, scale=dim**-0.5)
        assert (y.double() - pool.expected(scale=dim**-0.5)).abs().max() < 2e-5


@pytest.mark.parametrize("window", [1, 2, 3, 4, 9, 100])
def test_window_boundaries(window):
    pool = Pool([0, 8, 8], [9, 3, 1], heads=2, kv_heads=1, dim=8, v_dim=8, dtype=torch.float32, seed=window)
    y = pool.run(packed=True, scale=1.0, window=window)
    assert (y.double() - pool.expected(scale=1.0, window=window)).abs().max() < 2e-5


def test_writes_exactly_the_given_slots():
    pool = Pool([5, 0], [3, 2], heads=2, kv_heads=1, dim=4, v_dim=6, dtype=torch.float32, seed=3)
    k_before, v_before = pool.k_pages.clone(), pool.v_pages.clone()
    pool.run(packed=True, scale=1.0)
    written = pool.slots.long()
    news = (torch.cat([x[len(x) - n :] for x, n in zip(xs, pool.new, strict=True)]) for xs in (pool.keys, pool.values))
    for pages, before, new in zip((pool.k_pages, pool.v_pages), (k_before, v_before), news, strict=True):
        flat, old = pages.flatten(0, 1), before.flatten(0, 1)
        assert torch.equal(flat[written], new)
        flat[written] = old[written]
        assert torch.equal(flat.nan_to_num(123.0), old.nan_to_num(123.0))


def test_shared_prefix_pages_are_read_by_both_sequences():
    """Two sequences, the same first pages in their tables: as after a prefix-cache hit."""
    pool = Pool([8], [1], heads=2, kv_heads=2, dim=8, v_dim=8, dtype=torch.float32, seed=7)
    alone = pool.run(packed=True, scale=0.5)
    twice = Pool([8], [1], heads=2, kv_heads=2, dim=8, v_dim=8, dtype=torch.float32, seed=7)
    spare = int(next(p for p in range(1, twice.k_pages.shape[0]) if p not in twice.pages[0].tolist()))
    own = twice.pages.clone()
    own[0, 2] = spare
    twice.pages = torch.cat((twice.pages, own))
    twice.slots = torch.cat((twice.slots, torch.tensor([spare * PAGE_SIZE], dtype=torch.int32)))
    twice.kv_len, twice.query_start = twice.kv_len.repeat(2), torch.tensor([0, 1, 2], dtype=torch.int32)
    twice.queries, twice.keys, twice.values, twice.new = twice.queries * 2, twice.keys * 2, twice.values * 2, [1, 1]
    both = twice.run(packed=True, scale=0.5)
    assert torch.allclose(both, alone.expand(2, -1), atol=1e-5)


@pytest.mark.parametrize("pages", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "sinks": True}], ids=["plain", "all"])
def test_pages_of_8_bits_hold_multiples_of_their_scale(pages, per_head, options):
    """Naive attention over what dequantising the stored numbers gives, whose distance from x is bounded by hand."""
    pool = Pool(*MIXES["mixed"], heads=6, kv_heads=2, dim=10, v_dim=8, dtype=torch.float32, seed=torch.initial_seed())
    k_scale, v_scale = (0.01 * torch.rand(2) + 0.03 for _ in "kv") if per_head else torch.tensor([[0.03], [0.02]])

    def rounded(x, scale):
        stored = (x / scale[:, None]).clamp(-128 if pages is torch.int8 else -448, 127 if pages is torch.int8 else 448)
        stored = stored.round() if pages is torch.int8 else stored.to(pages).float()
        return stored * scale[:, None]

    fine = 0.5 if pages is torch.int8 else 2.0**-10
    for xs, scale in ((pool.keys, k_scale), (pool.values, v_scale)):
        for i, x in enumerate(xs):
            xs[i] = rounded(x, scale)
            near = x.abs() < 100 * scale[:, None]  # nothing saturates
            bound = fine * scale[:, None] + (0 if pages is torch.int8 else x.abs() / 16)
            assert ((xs[i] - x).abs() <= bound + 1e-6)[near].all()
    for name, scale in (("k_pages", k_scale), ("v_pages", v_scale)):
        pages_ = getattr(pool, name)
        poison = 77 if pages is torch.int8 else math.nan
        setattr(pool, name, (rounded(pages_, scale) / scale[:, None]).nan_to_num(poison).round(decimals=3).to(pages))
    if "sinks" in options:
        options = options | {"sinks": torch.randn(6)}
    y = pool.run(packed=True, scale=0.3, k_scale=k_scale, v_scale=v_scale, **options)
    assert (y.double() - pool.expected(scale=0.3, **options)).abs().max() < 2e-5


def test_pages_and_scales_that_do_not_fit():
    pool = Pool([3], [2], heads=2, kv_heads=2, dim=4, v_dim=4, dtype=torch.float32, seed=0)
    one = torch.ones(1)
    with pytest.raises(EngineError, match="float32 for KV pages of torch.float32 and a scale"):
        pool.run(packed=True, scale=1.0, k_scale=one, v_scale=one)
    pool.v_pages = pool.v_pages.to(torch.float8_e4m3fn)
    with pytest.raises(EngineError, match="KV pages of torch.float8_e4m3fn need a scale"):
        pool.run(packed=True, scale=1.0)
    with pytest.raises(EngineError, match=r"has the shape \[3\], expected \[1\] or \[2\]"):
        pool.run(packed=True, scale=1.0, v_scale=torch.ones(3))
    pool.k_pages = pool.k_pages.bfloat16()
    with pytest.raises(EngineError, match="was given torch.float32 for KV pages of torch.bfloat16"):
        pool.run(packed=True, scale=1.0, v_scale=one)


TREE_OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "wide": {"window": 29},
    "all": {"window": 3, "softcap": 2.0, "sinks": True},
}


def grown(rng, past, new, nodes, **shape):
    """A pool whose sequence s ends with nodes[s] nodes of a random tree, and what each of its new tokens sees."""
    pool = Pool(past, new, seed=rng.randrange(2**31), **shape)
    trees = [random_parents(rng, num) for num in nodes]
    ancestors = []
    for n, num, tree in zip(new, nodes, trees, strict=True):
        ancestors += [bits_of(tree, num - n + j, num) if n - j <= num and num else -1 for j in range(n)]
    return pool, trees, torch.tensor(ancestors, dtype=torch.int32)


def by_path(pool, trees, options):
    """Each new token by itself, over the keys of its path in their order."""
    rows = []
    for q, k, v, tree in zip(pool.queries, pool.keys, pool.values, trees, strict=True):
        known = len(k) - len(tree)
        for j in range(len(q)):
            place = len(k) - len(q) + j
            seen = [*range(min(known, place + 1)), *(known + node for node in path_to(tree, place - known))]
            rows.append(naive(q[j : j + 1], k[seen], v[seen], **options))
    return torch.cat(rows).flatten(1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", TREE_OPTIONS.values(), ids=TREE_OPTIONS)
def test_a_node_sees_its_path(dtype, options):
    """Trees that begin in this step, and trees that earlier steps began; at the beginning of a sequence; a chain."""
    rng = random.Random(torch.initial_seed())
    past, new, nodes = [40, 0, 70, 21, 9, 30], [9, 12, 4, 1, 40, 32], [8, 11, 30, 17, 0, 32]
    pool, trees, ancestors = grown(rng, past, new, nodes, heads=4, kv_heads=2, dim=10, v_dim=6, dtype=dtype)
    options = {"scale": 0.3, **options}
    if "sinks" in options:
        options["sinks"] = torch.randn(4).to(dtype)
    y = pool.run(packed=True, ancestors=ancestors, **options)
    assert (y.double() - by_path(pool, trees, options)).abs().max() < TOLERANCE[dtype]


def test_a_chain_is_what_it_is_without_a_tree():
    past, new = [30, 0, 5], [4, 9, 1]
    chains = [bits_of(range(-1, n - 1), j, n) for n in new for j in range(n)]
    for window in (0, 7):
        plain, *told = (
            Pool(past, new, heads=4, kv_heads=2, dim=8, v_dim=8, dtype=torch.float32, seed=1).run(
                packed=True, scale=0.3, window=window, ancestors=bits and torch.tensor(bits, dtype=torch.int32)
            )
            for bits in (None, [-1] * sum(new), chains)
        )
        assert torch.allclose(plain, told[0], atol=1e-6)
        assert torch.allclose(plain, told[1], atol=1e-6)
