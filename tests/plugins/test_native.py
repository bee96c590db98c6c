"""Native kernels against the references, on fresh random inputs, odd sizes, and outputs whose memory held NaN."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ingot.plugins import OPS, native
from ingot.plugins.dtypes import TORCH_DTYPES
from ingot.plugins.native_binders import MAX_ROWS
from random_tree import bits_of, random_parents

# One rounding of a result near 1 to 8: half an ulp of bf16 at 4 is 2^-7; fp32 sums differ in order only.
TOLERANCE = {
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1.6e-2),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}
DTYPES = list(TOLERANCE)
ROWS = [1, 2, 3, 5, 7, 16, 33, 70]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    build = native.compile(folder)
    if isinstance(build, native.Unavailable):
        pytest.skip(build.reason)
    return folder


@pytest.fixture(scope="session")
def kernels(folder):
    kernels = native.load(folder)
    assert isinstance(kernels, native.Kernels), kernels
    return kernels.binders


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh outputs hold NaN until a kernel writes them."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poisoned)


def launches_of(binder):
    """The binder with its kernel wrapped, and the list that grows with every launch."""
    calls = []

    def launch(*arguments):
        calls.append(len(arguments))
        binder.args[0](*arguments)

    return lambda *args: binder.func(launch, *args), calls


def compare(kernels, op, inputs, constant=(), native_run=True, tolerance=None, **attributes):
    """Runs the op natively and by its reference; `constant` are the indices of inputs known when binding."""
    binder, calls = launches_of(kernels[op])
    run = binder(attributes, tuple(x if i in constant else None for i, x in enumerate(inputs)))
    assert run is not None
    given = [None if x is None else x.clone() for x in inputs]
    got = run(*inputs)
    assert bool(calls) == native_run
    expected = OPS[op].reference(*given, **attributes)
    got, expected = (x if isinstance(x, tuple) else (x,) for x in (got, expected))
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, **(tolerance or TOLERANCE[a.dtype]), msg=lambda m, i=index: f"output {i}: {m}")
    for x, before in zip(inputs, given, strict=True):
        assert x is None or torch.equal(x, before), "an input was modified"
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "width,depth,bias", [(1, 1, True), (5, 7, False), (37, 40, True), (130, 384, False), (640, 392, True)]
)
def test_linear(kernels, dtype, width, depth, bias):
    for rows in (*ROWS, 150):  # 150: more than any kernel takes
        x, weight = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5
        inputs = [x.to(dtype), weight.to(dtype), torch.randn(width).to(dtype) if bias else None]
        compare(kernels, "Linear", inputs, constant=(1, 2), native_run=rows <= MAX_ROWS[dtype])


def test_linear_of_a_view_and_of_nothing(kernels):
    x, weight = torch.randn(4, 100), torch.randn(9, 40)
    compare(kernels, "Linear", [x[:, 30:70], weight, None], constant=(1,))
    compare(kernels, "Linear", [x[:0, :40], weight, None], constant=(1,))


def test_linear_reads_no_element_outside_its_operands(kernels):
    """Operands end where NaN begins, at every depth modulo the vector width."""
    for dtype, depth in itertools.product(DTYPES, range(1, 66, 3)):
        x, weight = torch.full((64 * depth,), math.nan).to(dtype), torch.full((64 * depth,), math.nan).to(dtype)
        x[: 2 * depth], weight[: 3 * depth] = torch.randn(2 * depth), torch.randn(3 * depth)
        inputs = [x[: 2 * depth].view(2, depth), weight[: 3 * depth].view(3, depth), None]
        compare(kernels, "Linear", inputs, constant=(1,), tolerance=dict(rtol=2e-2, atol=6e-2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size,chunks", [(384, 1), (50, 1), (64, 6), (7, 3)])
def test_rms_norm(kernels, dtype, size, chunks):
    for rows, residual in itertools.product(ROWS, (False, True)):
        for options in ({}, {"fp32_multiply": 1}, {"weight_offset": 1.0}):
            x, weight = (torch.randn(rows, size * chunks) * 3).to(dtype), torch.randn(size).to(dtype)
            inputs = [x, weight, torch.randn_like(x) if residual else None]
            attributes = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0, **options}
            got = compare(kernels, "RMSNorm", inputs, constant=(1,), **attributes)
            if residual:
                assert torch.equal(got[1], inputs[0] + inputs[2]), "the sum is rounded exactly as torch rounds it"


@pytest.mark.parametrize("dtype,table", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope(kernels, dtype, table, interleaved):
    for rows, (heads, head_dim, width, offset) in itertools.product(
        ROWS, [(6, 64, 64, 0), (3, 80, 20, 10), (2, 34, 34, 0)]
    ):
        x = torch.randn(rows, heads * head_dim + 48).to(dtype)
        angles = torch.randn(rows, width // 2) * 9
        cos_sin = torch.cat((angles.cos(), angles.sin()), 1).to(table)
        attributes = dict(num_heads=heads, head_dim=head_dim, interleaved=interleaved, rotary_offset=offset)
        (y,) = compare(kernels, "Rope", [x, cos_sin], **attributes)
        if table == torch.bfloat16:  # every product and the sum are rounded: nothing is left to differ
            assert torch.equal(y, OPS["Rope"].reference(x, cos_sin, **attributes))
        assert torch.equal(y[:, heads * head_dim :], x[:, heads * head_dim :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_cos_sin(kernels, dtype):
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 70, 2) / 70)
    for rows in ROWS:
        positions = torch.randint(0, 131072, (rows,), dtype=torch.int32)
        attributes = dict(dtype=next(n for n, d in TORCH_DTYPES.items() if d is dtype), attention_scaling=1.2)
        compare(kernels, "RotaryCosSin", [positions, inv_freq], constant=(1,), **attributes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation(kernels, dtype, activation):
    for rows, width in itertools.product(ROWS, (1, 31, 1024)):
        x = (torch.randn(rows, 2 * width) * 4).to(dtype)
        x[0, 0] = -120.0  # exp overflows here unless bounded
        compare(kernels, "GatedActivation", [x], activation=activation)


class Pool:
    """Sequences in scattered pages; every slot they do not own holds NaN."""

    def __init__(self, past, new, heads, kv_heads, dim, v_dim, dtype, page_size=16):
        lengths = [p + n for p, n in zip(past, new, strict=True)]
        counts = [-(-length // page_size) for length in lengths]
        order = (torch.randperm(sum(counts) + 3) + 1).tolist()
        self.k_pages = torch.full((sum(counts) + 4, page_size, kv_heads, dim), math.nan).to(dtype)
        self.v_pages = torch.full((sum(counts) + 4, page_size, kv_heads, v_dim), math.nan).to(dtype)
        self.pages = torch.zeros(len(past), max(counts) + 1, dtype=torch.int32)
        slots = []
        for s, length in enumerate(lengths):
            table = [order.pop() for _ in range(counts[s])]
            self.pages[s, : counts[s]] = torch.tensor(table)
            at = torch.tensor([table[i // page_size] * page_size + i % page_size for i in range(length)])
            self.k_pages.view(-1, kv_heads, dim)[at[: past[s]]] = torch.randn(past[s], kv_heads, dim).to(dtype)
            self.v_pages.view(-1, kv_heads, v_dim)[at[: past[s]]] = torch.randn(past[s], kv_heads, v_dim).to(dtype)
            slots.append(at[past[s] :])
        self.slots = torch.cat(slots).int()
        self.kv_len = torch.tensor(lengths, dtype=torch.int32)
        self.query_start = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
        self.qkv = [torch.randn(sum(new), n).to(dtype) for n in (heads * dim, kv_heads * dim, kv_heads * v_dim)]
        self.attributes = dict(layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim)
        self.scales = [None, None]

    def quantised(self, dtype, k_scale, v_scale):
        """The same with pages of 8 bits: what nobody owns is NaN in fp8 too, and in int8 some number."""
        self.scales = [k_scale, v_scale]
        for name in ("k_pages", "v_pages"):
            pages = getattr(self, name).float() * 30
            pages = pages.nan_to_num(99.0).round().to(dtype) if dtype is torch.int8 else pages.to(dtype)
            setattr(self, name, pages)
        return self

    def compare(self, kernels, packed, sinks=None, tolerance=None, constant=False, ancestors=None, **options):
        """Output and both pools after a native launch equal the reference's; the pool's NaN stay NaN."""
        binder, calls = launches_of(kernels["PagedAttention"])
        attributes = {"scale": 0.18, "window": 0, "softcap": 0.0, **options, **self.attributes}
        qkv = [torch.cat(self.qkv, 1), None, None] if packed else self.qkv
        pools = [[self.k_pages.clone(), self.v_pages.clone()] for _ in range(2)]
        index = [self.slots, self.query_start, self.kv_len, self.pages]
        known = self.scales if constant else [None, None]
        run = binder(attributes, (*[None] * 10, *known, None))
        got = run(*qkv, *index, *pools[0], sinks, *self.scales, ancestors)
        expected = OPS["PagedAttention"].reference(
            *qkv, *index, *pools[1], sinks, *self.scales, ancestors, **attributes
        )
        assert calls
        torch.testing.assert_close(got, expected, **(tolerance or TOLERANCE[got.dtype]))
        for a, b in zip(*pools, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim,v_dim", [(6, 2, 64, 64), (4, 4, 24, 40), (8, 1, 80, 80), (5, 5, 7, 3)])
def test_paged_attention(kernels, dtype, heads, kv_heads, dim, v_dim):
    pool = Pool([0, 100, 17, 0, 250, 63], [70, 1, 5, 1, 8, 1], heads, kv_heads, dim, v_dim, dtype)
    pool.compare(kernels, packed=True)
    pool.compare(kernels, packed=False, window=20)
    pool.compare(kernels, packed=True, sinks=torch.randn(heads).to(dtype))
    pool.compare(kernels, packed=False, softcap=2.0, window=90, sinks=torch.randn(heads).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pages", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("heads,kv_heads,dim,v_dim", [(6, 2, 64, 64), (8, 1, 80, 80), (5, 5, 7, 3)])
def test_attention_over_pages_of_8_bits(kernels, dtype, pages, heads, kv_heads, dim, v_dim):
    """Some of what is written saturates, some rounds to fp8's subnormal numbers."""
    each, one = 0.01 + 0.02 * torch.rand(kv_heads), torch.tensor([0.004])
    for scales in ((one, each), (each, one)):
        pool = Pool([0, 100, 17, 0, 250, 63], [70, 1, 5, 1, 8, 1], heads, kv_heads, dim, v_dim, dtype)
        pool.quantised(pages, *scales).compare(kernels, packed=True)
        sinks = torch.randn(heads).to(dtype)
        pool.compare(kernels, packed=False, constant=True, softcap=2.0, window=90, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim,v_dim", [(6, 2, 64, 64), (4, 4, 24, 40), (8, 1, 80, 80)])
def test_attention_over_a_tree_of_drafts(kernels, dtype, heads, kv_heads, dim, v_dim):
    """Trees at the end of sequences, some of whose nodes earlier steps wrote; a prompt and a row of decoding beside."""
    past, new, nodes = [0, 100, 17, 30, 250, 63, 45], [70, 1, 8, 32, 9, 1, 20], [0, 0, 7, 32, 8, 21, 31]
    rng, ancestors = random.Random(torch.initial_seed()), []
    for n, num in zip(new, nodes, strict=True):
        tree = random_parents(rng, num)
        ancestors += [bits_of(tree, num - n + j, num) if num and n - j <= num else -1 for j in range(n)]
    told = dict(ancestors=torch.tensor(ancestors, dtype=torch.int32))
    pool = Pool(past, new, heads, kv_heads, dim, v_dim, dtype)
    pool.compare(kernels, packed=True, **told)
    pool.compare(kernels, packed=False, window=20, **told)
    pool.compare(kernels, packed=False, softcap=2.0, window=5, sinks=torch.randn(heads).to(dtype), **told)
    scale = torch.tensor([0.004])
    pool.quantised(torch.int8, scale, scale).compare(kernels, packed=True, softcap=3.0, **told)


def test_numbers_are_stored_in_pages_as_torch_stores_them(kernels):
    """Every pattern of the upper 16 bits of fp32: numbers of all sizes, halves between two stored ones, NaN."""
    x = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32).view(1, -1)
    attributes = dict(num_heads=1, num_kv_heads=1, head_dim=1 << 16, v_head_dim=1 << 16, scale=0.0, window=0,
                      softcap=0.0, layer=0)  # fmt: skip
    step = [torch.tensor(entry, dtype=torch.int32) for entry in ([0], [0, 1], [1], [[0]])]
    for dtype, scale in itertools.product((torch.int8, torch.float8_e4m3fn), (1.0, 0.3)):
        pools, scales = (
            [[torch.zeros(1, 1, 1, 1 << 16, dtype=dtype) for _ in "kv"] for _ in range(2)],
            [torch.tensor([scale])] * 2,
        )
        kernels["PagedAttention"](attributes, (None,) * 13)(x, x, x, *step, *pools[0], None, *scales)
        OPS["PagedAttention"].reference(x, x, x, *step, *pools[1], None, *scales, **attributes)
        known = slice(None) if dtype.is_floating_point else ~x[0].isnan()  # int8 has no NaN
        for ours, theirs in zip(*pools, strict=True):
            assert torch.equal(ours.view(torch.int8)[0, 0, 0, known], theirs.view(torch.int8)[0, 0, 0, known])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_attention_splits_a_long_context(kernels, dtype):
    """One sequence with one KV head: fewer tasks than threads, so keys are split; a window leaves empty parts."""
    torch.set_num_threads(threads := 4)
    try:
        for past in (1999, 700, 64):
            pool = Pool([past], [1], 4, 1, 64, 64, dtype)
            pool.compare(kernels, packed=True)
            pool.compare(kernels, packed=True, window=100, sinks=torch.randn(4).to(dtype))
    finally:
        torch.set_num_threads(min(threads, os.cpu_count() or 1))


def test_kernels_decline_what_they_do_not_serve(kernels):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert kernels["Linear"]({}, (None, None, None)) is None
    assert kernels["Linear"]({}, (None, weight.double(), None)) is None
    assert kernels["GatedActivation"]({"activation": "tanh"}, (None,)) is None
    compare(kernels, "Linear", [x, weight, torch.randn(5)], constant=(1,), native_run=False)  # a bias known too late
    attributes = dict(num_heads=1, head_dim=8, interleaved=0, rotary_offset=0)
    compare(kernels, "Rope", [x, torch.randn(3, 8).bfloat16()], native_run=False, **attributes)
    positions, inv_freq = torch.arange(4), torch.rand(4)
    attributes = dict(dtype=1, attention_scaling=1.0)
    compare(kernels, "RotaryCosSin", [positions, inv_freq], constant=(1,), native_run=False, **attributes)


def test_library_for_another_cpu_is_refused(folder, tmp_path):
    record = json.loads((folder / native.RECORD).read_text())
    (tmp_path / native.LIBRARY).write_bytes((folder / native.LIBRARY).read_bytes())
    (tmp_path / native.RECORD).write_text(json.dumps(record | {"cpu_features": [*record["cpu_features"], "avx9000"]}))
    refused = native.load(tmp_path)
    assert isinstance(refused, native.Unavailable) and "avx9000" in refused.reason
    (tmp_path / native.RECORD).write_text(json.dumps(record | {"sources": "0" * 64}))
    refused = native.load(tmp_path)
    assert isinstance(refused, native.Unavailable) and "other sources" in refused.reason
    (tmp_path / native.RECORD).write_text(json.dumps(record))
    assert isinstance(native.load(tmp_path), native.Kernels)
    damaged = tmp_path / "damaged"  # a folder of its own: the library above is mapped
    damaged.mkdir()
    (damaged / native.RECORD).write_text(json.dumps(record))
    (damaged / native.LIBRARY).write_bytes(b"not a library")
    assert isinstance(native.load(damaged), native.Unavailable)
    assert isinstance(native.load(tmp_path / "absent"), native.Unavailable)


def test_without_a_compiler_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    refused = native.compile(tmp_path / "cpu")
    assert isinstance(refused, native.Unavailable) and "no C++ compiler" in refused.reason
    assert refused.describe() == {"kernels": "torch", "reason": refused.reason}


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    refused = native.compile(tmp_path / "cpu")
    assert isinstance(refused, native.Unavailable) and "no such option" in refused.reason
    assert not list((tmp_path / "cpu").iterdir())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_loaded(folder):
    script = (
        "import sys, torch; from pathlib import Path; from ingot.plugins import native\n"
        "assert isinstance(native.load(Path(sys.argv[1])), native.Kernels)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({p for p in maps if 'libgomp' in p or 'libomp' in p or 'libiomp' in p}))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
