"""Gather, element-wise ops and reductions on the GPU (interpreted where there is none) against the ONNX table."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from ingot.plugins import tactics_of
from ingot.plugins.onnx_ops import ONNX_OPS
from ingot.plugins.tactic import Site, Tensor
from triton_run import DEVICE, described, run_tactic

ONNX_TYPES = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# one unit in the last place of the type, for results rounded once from fp32
TOLERANCE = {
    torch.float32: dict(rtol=2e-6, atol=2e-6),
    torch.bfloat16: dict(rtol=8e-3, atol=1e-5),
    torch.float16: dict(rtol=1e-3, atol=1e-5),
}


def run(op, inputs, outputs, **attributes):
    """What every tactic of the op makes of these inputs; outputs: `Tensor` each."""
    found = tactics_of(op)(Site(op, attributes, tuple(map(described, inputs)), tuple(outputs)))
    assert found, "no tactic serves"
    for tactic in found:
        yield run_tactic(tactic, [None if x is None else x.to(DEVICE) for x in inputs], outputs)


def compare(op, inputs, tolerance=None, **attributes):
    expected = ONNX_OPS[op](attributes, tuple(inputs))(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for results in run(op, inputs, [described(y) for y in expected], **attributes):
        for ours, theirs in zip(results, expected, strict=True):
            exact = dict(rtol=0, atol=0)
            torch.testing.assert_close(ours.cpu(), theirs, **(tolerance or TOLERANCE.get(theirs.dtype, exact)))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("width", [1, 50, 1100])
def test_gather(dtype, index_type, width):
    data = (torch.randn(9, width) * 99).to(dtype)
    indices = torch.tensor([8, 0, 3, 3, -1, 5], dtype=index_type)
    expected = data[indices.long()]
    for (ours,) in run("Gather", [data, indices], [described(expected)], axis=0):
        assert torch.equal(ours.cpu(), expected)


def test_gather_of_a_vector_by_a_scalar():
    data, index = torch.randn(5), torch.tensor(3)
    for (ours,) in run("Gather", [data, index], [described(data[3])]):
        assert ours.cpu() == data[3]


def test_gather_clamps_what_is_out_of_range():
    data, indices = torch.randn(4, 6), torch.tensor([4, 2**30, -5, -(2**31)], dtype=torch.int32)
    for (ours,) in run("Gather", [data, indices], [described(data)]):
        assert torch.equal(ours.cpu(), data[[3, 3, 0, 0]])


def test_gather_along_another_axis_is_declined():
    site = Site("Gather", {"axis": 1}, (Tensor((4, 6), "float32"), Tensor((2,), "int32")), (Tensor((4, 2), "float32"),))
    assert tactics_of("Gather")(site) == []


SHAPES = [((7, 300), (7, 300)), ((7, 300), (7, 1)), ((7, 1), (7, 300)), ((7, 300), (300,)), ((300,), (7, 300)),
          ((7, 300), ()), ((), (7, 300)), ((7, 300), (1,)), ((1, 300), (7, 1)), ((), ()), ((1,), (5,)),
          ((2, 3, 40), (2, 3, 1)), ((2, 3, 40), (40,))]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_binary(op, dtype):
    for left, right in SHAPES:
        a, b = torch.randn(left).to(dtype), torch.randn(right).to(dtype)
        compare(op, [a, b.sign() * b.abs().clamp(min=0.1) if op == "Div" else b])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_integers_are_added_and_multiplied_exactly(op, dtype):
    """Numbers that fp32 cannot hold, and results that fill the type."""
    half = 2 ** (15 if dtype == torch.int32 else 31) if op == "Mul" else torch.iinfo(dtype).max // 2
    for left, right in [((1,), ()), ((96,), ()), ((700,), (700,)), ((7, 300), (300,)), ((7, 1), (7, 300))]:
        a, b = (torch.randint(-half, half, shape, dtype=dtype) for shape in (left, right))
        a.view(-1)[0] = half - 1  # odd, so that a detour through floats shows
        compare(op, [a, b])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ["Tanh", "Relu", "Gelu", "GeluTanh", "Sigmoid", "Sqrt", "Neg", "Identity"])
def test_unary(op, dtype):
    x = torch.cat([torch.randn(2000) * 5, torch.randn(2000) * 0.1, torch.tensor([0.0, -100.0, 100.0])]).to(dtype)
    x = x.abs() if op == "Sqrt" else x
    if op == "Identity":
        for (ours,) in run(op, [x], [described(x)]):
            assert torch.equal(ours.cpu(), x)
    else:
        compare(op.removesuffix("Tanh") or op, [x], **({"approximate": "tanh"} if op == "GeluTanh" else {}))


@pytest.mark.parametrize("source,target", list(itertools.permutations(ONNX_TYPES, 2)))
def test_cast(source, target):
    x = (torch.randn(3, 400) * 1000).to(source)
    # the interpreter truncates where the GPU rounds
    truncates = DEVICE == "cpu" and target == torch.bfloat16
    compare("Cast", [x], dict(rtol=8e-3 if truncates else 0, atol=0), to=ONNX_TYPES[target])


def test_a_cast_of_large_integers_is_exact():
    x = torch.tensor([2**40 + 1, -(2**62) - 5, 2**31 - 1])
    compare("Cast", [x[2:]], to=6)
    for (ours,) in run("Identity", [x], [described(x)]):
        assert torch.equal(ours.cpu(), x)


def test_elementwise_declines_what_it_does_not_know():
    f, i, boolean = Tensor((2, 3, 4), "float32"), Tensor((2, 3, 4), "int32"), Tensor((2, 3, 4), "bool")
    assert tactics_of("Div")(Site("Div", {}, (i, i), (i,))) == []
    assert tactics_of("Add")(Site("Add", {}, (i, Tensor((2, 3, 4), "int64")), (Tensor((2, 3, 4), "int64"),))) == []
    assert tactics_of("Add")(Site("Add", {}, (i, f), (f,))) == []
    assert tactics_of("Cast")(Site("Cast", {}, (boolean,), (f,))) == []
    assert tactics_of("Add")(Site("Add", {}, (f, Tensor((3, 1), "float32")), (f,))) == []


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 60, 128, 2000])
def test_softmax(dtype, width):
    x = (torch.randn(5, width) * 9).to(dtype)
    x[1, :-1] = -torch.inf
    compare("Softmax", [x], axis=-1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("width", [1, 8, 700])
def test_reduce_sum(dtype, keepdims, width):
    compare("ReduceSum", [torch.rand(5, width).to(dtype), torch.tensor([-1])], keepdims=keepdims)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [48, 1000])
def test_layer_normalization(dtype, bias, width):
    x, scale = (torch.randn(5, width) * 3 + 1).to(dtype), torch.randn(width).to(dtype)
    inputs = [x, scale, torch.randn(width).to(dtype)] if bias else [x, scale]
    # near zero the terms that cancel leave an error of their own size
    compare("LayerNormalization", inputs, TOLERANCE[dtype] | {"atol": 2e-5}, axis=-1, epsilon=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width,k", [(1, 1), (8, 2), (60, 4), (128, 8), (1000, 32), (32, 32)])
def test_top_k_takes_the_lowest_index_of_equals(dtype, width, k):
    x = torch.randint(-8, 8, (9, width)).to(dtype) / 4  # many ties; -0.0 among them
    x[0], x[1], x[2] = torch.randn(width).to(dtype), -torch.inf, 0.0
    x[3, width // 2], x[4, ::2], x[2, ::3] = torch.nan, -torch.inf, -0.0
    order = torch.sort(x.float(), dim=1, descending=True, stable=True)
    values, indices = order.values[:, :k].to(dtype), order.indices[:, :k]
    for ours in run("TopK", [x, torch.tensor([k])], [described(values), described(indices)], axis=-1):
        torch.testing.assert_close(ours[0].cpu(), values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours[1].cpu(), indices)


def test_reductions_decline_what_they_do_not_know():
    x, wide, k = Tensor((4, 6), "float32"), Tensor((4, 2000), "float32"), Tensor((1,), "int64")
    assert tactics_of("Softmax")(Site("Softmax", {"axis": 0}, (x,), (x,))) == []
    assert tactics_of("ReduceSum")(Site("ReduceSum", {"keepdims": 0}, (x, k), (Tensor((6,), "float32"),))) == []
    pair = Tensor((4, 2), "float32"), Tensor((4, 2), "int64")
    assert tactics_of("TopK")(Site("TopK", {"largest": 0}, (x, k), pair)) == []
    assert tactics_of("TopK")(Site("TopK", {}, (wide, k), pair)) == []


def test_every_kernel_compiles_for_every_architecture():
    """In a process of its own: this one may interpret kernels instead of compiling them."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 100


def compile_every_kernel():
    """Prints how many cubins there are: every op in bf16, sm_80 to sm_120, and casts."""
    from ingot.builder.targets.cubin import CAPABILITIES, compile_kernel

    def bf16(*shape):
        return Tensor(shape, "bfloat16")

    x, ints = bf16(16, 4096), Tensor((16,), "int32")
    binary = [Site(op, {}, (x, other), (x,)) for op in ("Add", "Sub", "Mul", "Div") for other in (x, bf16(4096))]
    unary = [Site(op, {}, (x,), (x,)) for op in ("Tanh", "Relu", "Gelu", "Sigmoid", "Sqrt", "Neg", "Identity")]
    casts = [
        Site("Cast", {}, (Tensor((8, 64), source),), (Tensor((8, 64), target),))
        for source, target in (
            ("float32", "bfloat16"),
            ("int64", "bfloat16"),
            ("bfloat16", "int32"),
            ("int64", "int32"),
        )
    ]
    integers = [
        Site(op, {}, (Tensor((64,), dtype), Tensor((), dtype)), (Tensor((64,), dtype),))
        for op in ("Add", "Sub", "Mul") for dtype in ("int32", "int64")
    ]  # fmt: skip
    sites = [
        *binary, *unary, *casts, *integers, *_of_heads(),
        Site("Gelu", {"approximate": "tanh"}, (x,), (x,)),
        Site("Gather", {}, (bf16(128256, 4096), ints), (x,)),
        Site("Softmax", {}, (bf16(16, 128),), (bf16(16, 128),)),
        Site("ReduceSum", {}, (bf16(16, 8), Tensor((1,), "int64")), (bf16(16, 1),)),
        Site("LayerNormalization", {}, (x, bf16(4096), bf16(4096)), (x,)),
        Site("TopK", {}, (bf16(16, 128), Tensor((1,), "int64")), (bf16(16, 8), Tensor((16, 8), "int64"))),
        Site("TopK", {}, (bf16(16, 1024), Tensor((1,), "int64")), (bf16(16, 32), Tensor((16, 32), "int64"))),
    ]  # fmt: skip
    kernels = set()
    for site in sites:
        found = tactics_of(site.op)(site)
        assert found, site
        kernels |= {launch.kernel for tactic in found for launch in tactic.launches}
    cubins = [compile_kernel(kernel, capability) for capability in CAPABILITIES for kernel in kernels]
    assert all(cubin.data[:4] == b"\x7fELF" for cubin in cubins)
    print(len(cubins), "cubins")


def _of_heads():
    """Sites of tests/plugins/test_heads_gpu.py as a model has them."""
    ints, state, pool = Tensor((16,), "int32"), Tensor((16, 4096), "bfloat16"), Tensor((1, 4096), "bfloat16")
    step = (*[ints] * 3, Tensor((9,), "int32"), Tensor((8,), "int32"), Tensor((8, 128), "int32"), *[ints] * 3)
    head, draft = {"page_size": 16, "guesses": 1}, {"page_size": 16, "vocab_size": 32000}
    ids, moves, pages = Tensor((32000,), "int32"), Tensor((8, 2), "int32"), Tensor((1, 16, 8, 128), "float8_e4m3fn")
    told, handed_on = (Tensor((16, 8), "int32"), Tensor((16, 8), "float32")), (Tensor((16, 8, 8), "int32"),) * 2
    return [
        Site("DraftHead", head | {"first": True}, (*[ints] * 8, ids), (*step, *[ints] * 3)),
        Site("DraftHead", head | {"first": False}, (*[ints] * 8, ids), step),
        *(Site("Draft", draft | {"step": name}, (*[ints] * 9,), (*step, ints, ints)) for name in ("first", "path")),
        Site("Draft", draft | {"step": "next"}, (*[ints] * 9,), step),
        Site("Grow", draft | {"branches": 8}, (ints, ints, *told, ints, ids), (*step, ints, ints, *handed_on)),
        *(Site("Unpack", {}, (ints, ints), given) for given in (step, (*step, ints))),
        Site("MoveRows", {}, (pages, moves), (pages,)),
        Site("KeepStates", {}, (state, ints), (pool,)),
        Site("ReadStates", {}, (ints, pool, pool), (Tensor((16, 8192), "bfloat16"),)),
        Site("Concat", {"axis": -1}, (state, state), (Tensor((16, 8192), "bfloat16"),)),
    ]


if __name__ == "__main__":
    compile_every_kernel()
