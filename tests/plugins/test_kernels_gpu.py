"""Every tactic of the GPU kernels against the references: on the GPU where there is one, interpreted otherwise."""

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from ingot.builder.targets.cubin import CAPABILITIES, compile_all
from ingot.engines.errors import BuildError
from ingot.plugins import OPS, cublas, tactics_of
from ingot.plugins.tactic import Device, Gemm, Site, Tensor
from triton_run import DEVICE, described, run_tactic

GPU = DEVICE == "cuda"
# the interpreter multiplies bf16 matrices wrongly, so it is left to the GPU
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {
    torch.float32: dict(rtol=2e-5, atol=2e-5),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1.6e-2),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}


def compare(op, inputs, tolerance=None, device=None, **attributes):
    """Runs each tactic of the op on these inputs; every one equals the reference. Returns the tactics."""
    expected = OPS[op].reference(*inputs, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    on_device = [None if x is None else x.to(DEVICE) for x in inputs]
    outputs = [described(y) for y in expected]
    site = Site(op, attributes, tuple(map(described, inputs)), tuple(outputs), device or Device())
    found = [tactic for tactic in tactics_of(op)(site) if proposed(tactic)]
    assert found, "no tactic serves"
    for tactic in found:
        for ours, theirs in zip(run_tactic(tactic, on_device, outputs), expected, strict=True):
            torch.testing.assert_close(
                ours.cpu(), theirs, **(tolerance or TOLERANCE[theirs.dtype]), msg=lambda m, t=tactic: f"{t.name}: {m}"
            )
    return found


def proposed(tactic):
    """Whether cuBLASLt knows as many algorithms as the tactic counts on; true for one that does without it."""
    try:
        return all(cublas.choose(each.kernel) for each in tactic.launches if isinstance(each.kernel, Gemm))
    except BuildError:
        return False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size,chunks", [(50, 1), (64, 3), (384, 1), *([(4096, 1), (8192, 1)] if GPU else [])])
def test_rms_norm(dtype, size, chunks):
    for residual, options in itertools.product((False, True), ({}, {"fp32_multiply": 1}, {"weight_offset": 1.0})):
        x, weight = (torch.randn(3, size * chunks) * 3).to(dtype), torch.randn(size).to(dtype)
        attributes = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0, **options}
        compare("RMSNorm", [x, weight, torch.randn_like(x) if residual else None], **attributes)


@pytest.mark.parametrize("dtype,table", [*((d, d) for d in DTYPES), (torch.float16, torch.float32)])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("heads,head_dim,rotary,offset", [(6, 64, 64, 0), (3, 80, 20, 10), (2, 34, 34, 0)])
def test_rope(dtype, table, interleaved, heads, head_dim, rotary, offset):
    x, angles = torch.randn(3, heads * head_dim + 48).to(dtype), torch.randn(3, rotary // 2) * 9
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).to(table)
    attributes = dict(num_heads=heads, head_dim=head_dim, interleaved=interleaved, rotary_offset=offset)
    compare("Rope", [x, cos_sin], **attributes)


@pytest.mark.parametrize("dtype", [1, 16, 10])
def test_rotary_cos_sin(dtype):
    inv_freq = 1.0 / 10000 ** (torch.arange(0, 70, 2) / 70)
    positions = torch.tensor([0, 1, 77, 131071], dtype=torch.int32)
    compare("RotaryCosSin", [positions, inv_freq], dtype=dtype, attention_scaling=1.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("width", [1, 31, 1500])
def test_gated_activation(dtype, activation, width):
    x = (torch.randn(3, 2 * width) * 4).to(dtype)
    x[0, 0] = -120.0  # exp overflows here unless bounded
    compare("GatedActivation", [x], activation=activation)


def test_an_activation_that_is_not_known_has_no_tactic():
    x = described(torch.randn(2, 8))
    assert tactics_of("GatedActivation")(Site("GatedActivation", {"activation": "tanh"}, (x,), (x,))) == []


SHAPES = [(1, 40, 70), (3, 33, 100), (17, 70, 130)]
if GPU:
    SHAPES += [(1, 4096, 4096), (4, 6144, 4096), (16, 4096, 14336), (64, 1000, 1030), (200, 1536, 520), (700, 640, 384)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width,depth", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype, rows, width, depth, bias):
    x, weight = torch.randn(rows, depth).to(dtype), (torch.randn(width, depth) / depth**0.5).to(dtype)
    inputs = [x, weight, torch.randn(width).to(dtype) if bias else None]
    names = [tactic.name for tactic in compare("Linear", inputs)]
    assert len(set(names)) == len(names)


def test_linear_splits_the_depth_where_the_weight_has_few_rows():
    x, weight = torch.randn(5, 1100).half(), (torch.randn(40, 1100) / 33).half()
    found = compare("Linear", [x, weight, torch.randn(40).half()])
    assert any(tactic.zeros and tactic.workspace for tactic in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,width,depth", [(1, 24, 70), (2, 20, 70), (5, 96, 64), (8, 33, 100), (70, 17, 40)])
@pytest.mark.parametrize("activation,bias", [("silu", False), ("gelu_tanh", True), ("gelu", False), ("relu", True)])
def test_gated_linear(dtype, rows, width, depth, activation, bias):
    x, weight = torch.randn(rows, depth).to(dtype), (torch.randn(2 * width, depth) / depth**0.5).to(dtype)
    inputs = [x, weight, torch.randn(2 * width).to(dtype) if bias else None]
    names = [tactic.name for tactic in compare("GatedLinear", inputs, activation=activation)]
    assert len(set(names)) == len(names) and {", then" in name for name in names} == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1024, 2048])
def test_gated_linear_in_blocks_of_rows(rows):
    torch.cuda.synchronize()  # makes a context current, in which cuBLASLt starts
    if missing := cublas.why_missing():
        pytest.skip(missing)
    x, weight = torch.randn(rows, 256).bfloat16(), (torch.randn(2 * 192, 256) / 16).bfloat16()
    found = compare("GatedLinear", [x, weight, None], device=Device(cublas=True), activation="silu")
    assert any(tactic.name.endswith("by 512 rows") for tactic in found)


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("width,depth", [(8, 2048), (33, 100), *([(6144, 4096), (1030, 2056)] if GPU else [])])
def test_few_rows(rows, width, depth):
    x, weight = torch.randn(rows, depth).half(), (torch.randn(width, depth) / depth**0.5).half()
    assert any(tactic.name.startswith("row") for tactic in compare("Linear", [x, weight, None]))


def test_every_kernel_compiles_for_every_architecture():
    """The first tactics of a Llama-like layer in bf16."""

    def bf16(*shape):
        return Tensor(shape, "bfloat16")

    norm = {"epsilon": 1e-5, "weight_offset": 0.0, "fp32_multiply": 0}
    rope = dict(num_heads=40, head_dim=128, interleaved=0, rotary_offset=0)
    sites = [
        Site("RMSNorm", norm, (bf16(4, 4096), bf16(4096), bf16(4, 4096)), (bf16(4, 4096),) * 2),
        Site("Rope", rope, (bf16(4, 6144), bf16(4, 128)), (bf16(4, 6144),)),
        Site("RotaryCosSin", {"dtype": 16, "attention_scaling": 1.0},
             (Tensor((4,), "int32"), Tensor((64,), "float32")), (bf16(4, 128),)),
        Site("GatedActivation", {"activation": "silu"}, (bf16(4, 28672),), (bf16(4, 14336),)),
        *(Site("Linear", {}, (bf16(rows, 4096), bf16(6144, 4096), None), (bf16(rows, 6144),)) for rows in (1, 16, 512)),
        *(Site("GatedLinear", {"activation": "silu"}, (bf16(rows, 4096), bf16(28672, 4096), None), (bf16(rows, 14336),))
          for rows in (1, 4, 16, 512)),
        Site("Linear", {}, (bf16(16, 4096), bf16(512, 4096), bf16(512)), (bf16(16, 512),)),
    ]  # fmt: skip
    kernels = {launch.kernel for site in sites for t in tactics_of(site.op)(site)[:2] for launch in t.launches}
    assert len(kernels) >= 12
    for capability in CAPABILITIES:
        for kernel, cubin in compile_all(kernels, capability).items():
            if isinstance(cubin, BuildError):  # of many rows, where a program has 99 KiB
                small = "needs 147456 bytes of shared memory, a program on sm_.* has 101376"
                assert capability in (86, 89, 120) and re.search(small, str(cubin)), (kernel, cubin)
            else:
                assert cubin.data[:4] == b"\x7fELF" and cubin.shared <= 227 << 10, kernel
