"""The native kernels of quantised ops against their references, for this CPU, for AVX2 and for plain C++."""

import ctypes
import itertools
import math
import os
import platform
import shutil
import subprocess

import pytest
import torch
from ingot.plugins import OPS, native, native_quantised
from ingot.plugins.dtypes import TORCH_DTYPES
from ingot.plugins.onnx_quantise import bind_quantize

ONNX = {dtype: number for number, dtype in TORCH_DTYPES.items()}
FP8 = torch.float8_e4m3fn
ACTIVATIONS = [torch.float32, torch.bfloat16, torch.float16]
# fp32 sums in another order, and one rounding to y's dtype; outputs are near 1
TOLERANCE = {
    torch.float32: dict(rtol=1e-4, atol=1e-4),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1e-2),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}
MACHINES = {"this": ("-march=native", "-O2"), "avx2": ("-march=x86-64-v3", "-O1"), "plain": ("-march=x86-64", "-O1")}
ROWS = (1, 2, 3, 5, 19)


@pytest.fixture(scope="module", params=MACHINES)
def kernels(request, tmp_path_factory):
    """Binders over the two kernels alone, compiled for what this CPU has or for less."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64")
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    sources = [str(native.PACKAGE / name / "kernel.cpp") for name in ("quantised_linear", "quantise_tokens")]
    command = [compiler, *native.FLAGS, *MACHINES[request.param], "-fopenmp", "-shared", *sources, "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))

    def function(name, *types):
        found = getattr(library, name)
        found.argtypes, found.restype = types, None
        return found

    return native_quantised.binders(library, function)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh outputs hold NaN (or -1) until a kernel writes them."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: _poisoned(empty(*args, **options)))


def _poisoned(x):
    return x.fill_(math.nan if x.is_floating_point() else -1)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def weight(kind, width, depth, group, zeros):
    """Numbers [N, K] as the reference and as the kernel reads them, scale, zeros likewise."""
    shape = (width, -(-depth // group)) if group else (width,)
    scale = (torch.rand(shape) + 0.5) / depth**0.5 / {"int4": 4, "int8": 70, "fp8": 100}[kind]
    if kind == "fp8":
        numbers = torch.randint(0, 256, (width, depth), dtype=torch.uint8)
        numbers = torch.where(numbers & 127 == 127, 0, numbers).to(torch.uint8).view(FP8)  # no NaN
        return numbers, numbers, scale, None, None
    low, high = (-8, 8) if kind == "int4" else (-128, 128)
    numbers = torch.randint(low, high, (width, depth), dtype=torch.int8)
    zero = torch.randint(low, high, shape, dtype=torch.int8) if zeros else None
    if kind == "int8":
        return numbers, numbers, scale, zero, zero
    return numbers, packed(numbers), scale, zero, None if zero is None else packed(zero)


def packed(numbers):
    """INT4 as ONNX packs it: flat, two in a byte, the first in the lower half; rows are kept where they are even."""
    flat = numbers.flatten()
    flat = torch.cat((flat, flat.new_zeros(len(flat) % 2))).view(-1, 2).to(torch.uint8) & 15
    both = flat[:, 0] | flat[:, 1] << 4
    return both if numbers.shape[-1] % 2 else both.view(*numbers.shape[:-1], -1)


def activations(dtype, rows, depth, x_group):
    """x as it is, or in 8 bits with its scales (x_group None: one for all)."""
    if dtype in ACTIVATIONS:
        return torch.randn(rows, depth).to(dtype), None
    if x_group is None:
        x = (torch.randn(rows, depth) * 40).clamp(-128, 127)
        return (x.round() if dtype is torch.int8 else x).to(dtype), torch.tensor(1 / 40)
    return OPS["QuantiseTokens"].reference(torch.randn(rows, depth), dtype=ONNX[dtype], group=x_group)


def compare(kernels, stored, x, x_scale, bias, y_dtype, tolerance=None, **groups):
    """One product, natively and by its reference."""
    numbers, given, scale, zero, given_zero = stored
    attributes = dict(dtype=ONNX[y_dtype], **{"group": 0, "x_group": 0, **groups})
    binder, launches = kernels["QuantisedLinear"], []
    launch, *options = binder.args

    def counted(*arguments):
        launches.append(1)
        launch(*arguments)

    run = binder.func(counted, *options, attributes, (None, given, scale, given_zero, None, bias))
    assert run is not None
    y = run(x, given, scale, given_zero, x_scale, bias)
    assert launches
    expected = OPS["QuantisedLinear"].reference(x, numbers, scale, zero, x_scale, bias, **attributes)
    assert y.dtype is y_dtype
    torch.testing.assert_close(y, expected, **(tolerance or TOLERANCE[y_dtype]))


FORMS = [("int4", True), ("int4", False), ("int8", True), ("int8", False), ("fp8", False)]


@pytest.mark.parametrize("kind, zeros", FORMS)
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_weights_in_few_bits(kernels, threads, kind, zeros, dtype):
    for width, depth, group in ((37, 300, 0), (1, 2, 0), (66, 384, 128), (5, 96, 32), (33, 100, 48), (4, 130, 10)):
        stored = weight(kind, width, depth, group, zeros)
        bias = torch.randn(width).to(dtype) if width % 2 else None
        for rows in ROWS:
            x, _ = activations(dtype, rows, depth, None)
            compare(kernels, stored, x, None, bias, dtype, group=group)


@pytest.mark.parametrize("kind, zeros", FORMS)
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_activations_in_8_bits(kernels, threads, kind, zeros, dtype):
    cases = ((37, 300, 0, None), (66, 384, 128, 0), (7, 384, 128, 128), (9, 100, 50, 20), (33, 260, 0, 26))
    for (width, depth, group, x_group), y_dtype in zip(cases, itertools.cycle(ACTIVATIONS)):
        stored = weight(kind, width, depth, group, zeros)
        bias = torch.randn(width).to(y_dtype) if width % 2 else None
        for rows in ROWS:
            x, x_scale = activations(dtype, rows, depth, x_group)
            compare(kernels, stored, x, x_scale, bias, y_dtype, group=group, x_group=x_group or 0)


def test_rows_of_a_view_and_none_at_all(kernels):
    stored = weight("int4", 9, 64, 32, True)
    wide = torch.randn(6, 200)
    for x in (wide[:, 30:94], wide[::2, :64], wide[:0, :64]):
        compare(kernels, stored, x, None, None, torch.float32, group=32)


def test_nothing_outside_the_operands_is_read(kernels):
    """x ends where NaN begins and weights lie among codes of NaN, at every depth modulo the vector width."""
    for depth, rows in itertools.product(range(1, 140, 9), (2, 6)):
        x = torch.full((rows + 9, depth), math.nan)
        x[:rows] = torch.randn(rows, depth)
        codes = torch.full((12, depth), 127, dtype=torch.uint8)
        codes[:5] = torch.randint(0, 127, (5, depth))
        stored = codes.view(FP8)[:5], codes.view(FP8)[:5], torch.rand(5) / 1000, None, None
        for dtype in (torch.float32, torch.bfloat16):
            compare(kernels, stored, x.to(dtype)[:rows], None, None, torch.float32, TOLERANCE[torch.bfloat16])


def test_integer_products_are_exact(kernels):
    """The largest numbers of each sign, in the longest sums: fp32 holds them, since scales are powers of two."""
    if not kernels["QuantisedLinear"].args[1]:
        pytest.skip("this machine's kernels multiply bytes as floats")
    depth = 14336
    numbers, x = torch.full((33, depth), -128, dtype=torch.int8), torch.full((9, depth), -128, dtype=torch.int8)
    numbers[::2] = 127
    x[::2] = 127
    for rows in (1, 9):
        run = kernels["QuantisedLinear"](
            dict(dtype=1, group=0, x_group=0), (None, numbers, torch.ones(33), *[None] * 3)
        )
        y = run(x[:rows], numbers, torch.ones(33), None, torch.ones(rows, 1))
        assert torch.equal(y, (x[:rows].double() @ numbers.double().T).float())


def test_what_is_not_served_goes_to_the_reference(kernels):
    """Three dimensions, and a bias that was not known: packed numbers are unpacked for it."""
    numbers, given, scale, zero, given_zero = weight("int4", 6, 64, 32, True)
    attributes = dict(dtype=1, group=32, x_group=0)
    run = kernels["QuantisedLinear"](attributes, (None, given, scale, given_zero, None, None))
    x, bias = torch.randn(2, 3, 64), torch.randn(6)
    expected = OPS["QuantisedLinear"].reference(x[0], numbers, scale, zero, None, bias, **attributes)
    torch.testing.assert_close(run(x[0], given, scale, given_zero, None, bias), expected)
    bind = kernels["QuantisedLinear"]
    assert bind(attributes, (None, None, scale, None, None, None)) is None
    assert bind(attributes, (None, given.double(), scale, None, None, None)) is None
    assert bind(attributes | {"group": 3}, (None, given, torch.ones(6, 22), None, None, None)) is None
    assert bind(attributes | {"dtype": ONNX[torch.int32]}, (None, given, scale, None, None, None)) is None


# -- activations -------------------------------------------------------------------------------------------------------


def same(found, expected):
    assert found.dtype is expected.dtype and found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("stored", [torch.int8, FP8])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_quantise_tokens(kernels, threads, stored, dtype):
    for (rows, depth), group in itertools.product([(1, 1), (5, 33), (40, 640), (3, 1000)], (0, 7, 128)):
        x = (torch.randn(rows, depth) * 10.0 ** torch.randint(-4, 4, (rows, 1))).to(dtype)
        x[rows // 2] = 0
        attributes = dict(dtype=ONNX[stored], group=group)
        run = kernels["QuantiseTokens"](attributes, (None,))
        for each in (x, x.flip(0)[::2], x.repeat(1, 2)[:, : max(1, depth // 2)], x[:0]):
            (values, scale), expected = run(each), OPS["QuantiseTokens"].reference(each, **attributes)
            same(values, expected[0])
            same(scale, expected[1])


@pytest.mark.parametrize("stored", [torch.int8, FP8])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_every_number_is_rounded_as_the_reference_rounds(kernels, stored, dtype):
    """All 16-bit numbers, and their neighbourhoods in fp32: ties, subnormals, saturation, infinities, NaN for FP8."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16 if dtype is torch.float32 else dtype)
    x = x.to(dtype).view(256, 256)
    if dtype is torch.float32:
        x = torch.cat((x, (x.view(torch.int32) + 1).view(dtype), (x.view(torch.int32) - 1).view(dtype)))
    if stored is torch.int8:
        x = x.nan_to_num()
    for scale in (1.0, 0.37):
        scales = torch.tensor(scale)
        attributes = {"output_dtype": ONNX[stored]}
        run, reference = (bind(attributes, (None, scales)) for bind in (kernels["QuantizeLinear"], bind_quantize))
        found, expected = run(x, scales), reference(x, scales)
        if stored is FP8:  # a NaN has two codes
            assert torch.equal(found.float().isnan(), expected.float().isnan())
            found, expected = (y.float().nan_to_num(0.0).to(FP8) for y in (found, expected))
        same(found, expected)


def test_other_forms_of_quantize_linear_are_left_to_torch(kernels):
    bind, scale = kernels["QuantizeLinear"], torch.tensor(0.5)
    assert bind({"output_dtype": ONNX[torch.int8]}, (None, None)) is None
    assert bind({"output_dtype": ONNX[torch.uint8]}, (None, scale)) is None
    assert bind({"output_dtype": ONNX[torch.int8]}, (None, torch.ones(3))) is None
    assert bind({}, (None, scale, torch.tensor(3, dtype=torch.int8))) is None
    run = bind({"output_dtype": ONNX[torch.int8]}, (None, scale))
    assert run(torch.tensor([[[0.25, 0.75, 100.0]]]), scale).tolist() == [[[0, 2, 127]]]
