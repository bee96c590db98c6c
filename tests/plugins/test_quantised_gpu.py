"""Every tactic of the quantised ops against the references: on the GPU where there is one, interpreted otherwise."""

import re

import pytest
import torch

pytest.importorskip("triton")

from ingot.builder.targets.cubin import Cubin, compile_all
from ingot.builder.targets.sass import disassembled
from ingot.calibration.formats import Format, round_to_nearest
from ingot.engines.errors import BuildError
from ingot.plugins import OPS, cublas, tactics_of
from ingot.plugins.onnx_quantise import bind_dequantize
from ingot.plugins.quantise_tokens.reference import round_to
from ingot.plugins.tactic import Device, Gemm, Site, Tensor
from onnx import TensorProto
from triton_run import DEVICE, described, run_tactic

GPU = DEVICE == "cuda"
TYPES = {"int8": TensorProto.INT8, "fp8_e4m3": TensorProto.FLOAT8E4M3FN}
ONNX = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
# the interpreter multiplies bf16 matrices wrongly, so they are left to the GPU
HALF = torch.bfloat16 if GPU else torch.float16
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 1.6e-2}


def packed(numbers):
    """int8 numbers -8 .. 7 as ONNX packs them."""
    flat = torch.nn.functional.pad(numbers.flatten(), (0, numbers.numel() % 2)).view(torch.uint8)
    return flat[::2] & 15 | flat[1::2] << 4


def compare(op, inputs, int4=(), device=None, wanted=lambda name: True, few=0.02, **attributes):
    """Runs each tactic; every one equals the reference. int4: inputs that are int4 in int8. Returns the names.

    few: share of the 8-bit results that may be a neighbour, where what is quantised differs in its last bits.
    """
    expected = OPS[op].reference(*inputs, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [described(y) for y in expected]
    shapes = [Tensor(tuple(x.shape), "int4") if i in int4 else described(x) for i, x in enumerate(inputs)]
    on_device = [None if x is None else (packed(x) if i in int4 else x).to(DEVICE) for i, x in enumerate(inputs)]
    site = Site(op, attributes, tuple(shapes), tuple(outputs), device or Device())
    found = [tactic for tactic in tactics_of(op)(site) if wanted(tactic.name) and proposed(tactic)]
    assert found, "no tactic serves"
    for tactic in found:
        for ours, theirs in zip(run_tactic(tactic, on_device, outputs), expected, strict=True):
            if theirs.dtype in (torch.int8, torch.float8_e4m3fn):  # a neighbour, now and then
                off = (ours.cpu().float() - theirs.float()).abs()
                assert not (off > theirs.float().abs() * 0.13 + 1.01).any(), tactic.name
                assert (off > 0).float().mean() <= few, tactic.name
                continue
            bound = TOLERANCE[HALF if few > 0.1 else theirs.dtype]
            if "dequantised" in tactic.name:
                bound *= 2  # rounds the weight, too
            largest = float(theirs.float().abs().max())
            torch.testing.assert_close(ours.cpu().float(), theirs.float(), rtol=bound, atol=bound * largest,
                                       msg=lambda m, t=tactic: f"{t.name}: {m}")  # fmt: skip
    assert len({tactic.name for tactic in found}) == len(found)
    return [tactic.name for tactic in found]


def proposed(tactic):
    """Whether cuBLASLt knows as many algorithms as the tactic counts on; true for one that does without it."""
    try:
        return all(cublas.choose(each.kernel) for each in tactic.launches if isinstance(each.kernel, Gemm))
    except BuildError:
        return False


def linear(rows, width, depth, form, dtype=HALF, activation=None, bias=False):
    """Inputs and attributes of a QuantisedLinear, and which inputs are int4. activation: None, or a Format of x; its
    rows 0: one scale for all."""
    stored = round_to_nearest(torch.randn(width, depth) * torch.rand(width, 1), form)
    scale, zero = stored.scale, stored.zero
    if not form.group:
        scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
    elif form.rows > 1:
        scale = scale.repeat_interleave(form.rows, 0)[:width].contiguous()
    x, x_scale, x_group = torch.randn(rows, depth).to(dtype), None, 0
    if activation:
        quantised = round_to_nearest(x, activation)
        x, x_scale, x_group = quantised.values, quantised.scale, activation.group
        if activation.rows == 0:
            x_scale = x_scale.reshape(())
    b = torch.randn(width).to(dtype) if bias else None
    inputs = [x, stored.values, scale, zero, x_scale, b]
    int4 = ((1, 3) if zero is not None else (1,)) if form.dtype == "int4" else ()
    return inputs, dict(int4=int4, dtype=ONNX[dtype], group=form.group, x_group=x_group)


WEIGHTS = {
    "int4": Format("int4", 128), "int4 zero": Format("int4", 32, symmetric=False), "int4 rows": Format("int4"),
    "int8": Format("int8"), "int8 zero": Format("int8", 64, symmetric=False), "fp8": Format("fp8_e4m3"),
    "fp8 block": Format("fp8_e4m3", 128, 128),
}  # fmt: skip
SHAPES = [(1, 26, 384), (3, 20, 256), (20, 70, 384), (70, 40, 256)]
if GPU:
    SHAPES += [
        (1, 6144, 4096),
        (4, 4096, 14336),
        (16, 1030, 4096),
        (64, 4096, 4096),
        (300, 1536, 1024),
        (700, 640, 384),
    ]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows,width,depth", SHAPES)
def test_a_weight_in_few_bits(name, rows, width, depth):
    inputs, how = linear(rows, width, depth, WEIGHTS[name], bias=rows != 3)
    names = compare("QuantisedLinear", inputs, **how)
    assert any(each.startswith("row") for each in names) == (rows <= 4)
    assert any("x" in each and not each.startswith("row") for each in names)


@pytest.mark.parametrize("weight,activation", [
    ("int8", Format("int8")), ("int8", Format("int8", rows=0)), ("int4", Format("int8")), ("int4", Format("int8", 64)),
    ("fp8", Format("fp8_e4m3")), ("fp8", Format("fp8_e4m3", rows=0)), ("fp8 block", Format("fp8_e4m3", 128)),
])  # fmt: skip
@pytest.mark.parametrize("rows,width,depth", SHAPES)
def test_both_in_few_bits(weight, activation, rows, width, depth):
    inputs, how = linear(rows, width, depth, WEIGHTS[weight], activation=activation, bias=rows == 3)
    compare("QuantisedLinear", inputs, **how)


@pytest.mark.parametrize("weight", ["int4", "int4 zero", "int8", "fp8"])
@pytest.mark.parametrize("rows", [2, 33])
def test_activations_in_fp32(weight, rows):
    inputs, how = linear(rows, 40, 256, WEIGHTS[weight], torch.float32, bias=True)
    compare("QuantisedLinear", inputs, **how)


@pytest.mark.parametrize("weight,activation,depth", [
    (Format("int8", 50), None, 200), (Format("int4", 10, symmetric=False), None, 110), (Format("fp8_e4m3"), None, 101),
    (Format("int8", 64, symmetric=False), Format("int8"), 128), (Format("int8", 50), Format("int8", 20), 100),
])  # fmt: skip
@pytest.mark.parametrize("rows", [2, 20])
def test_what_no_kernel_multiplies_as_it_is(weight, activation, depth, rows):
    """Odd groups and depths, zero points with INT8 activations: there is a way for each."""
    inputs, how = linear(rows, 30, depth, weight, activation=activation, bias=True)
    compare("QuantisedLinear", inputs, **how)


def test_the_depth_is_split_where_the_weight_has_few_rows():
    for name, activation in (("int4", None), ("fp8", Format("fp8_e4m3")), ("int8", Format("int8"))):
        inputs, how = linear(5, 40, 2176, WEIGHTS[name], activation=activation, bias=True)
        names = compare(
            "QuantisedLinear", inputs, **how, wanted=lambda name: "row" not in name and "parts1" not in name
        )
        assert names


@pytest.mark.gpu
@pytest.mark.parametrize("form,depth", [
    (WEIGHTS["int4"], 1152), (WEIGHTS["int4 zero"], 1056), (Format("int4", 128, symmetric=False), 1152),
    (WEIGHTS["int4 rows"], 1048),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 33, 64, 100])
def test_half_bytes_are_read_four_bytes_at_once(form, depth, dtype, rows):
    """What PTX computes, the interpreter does not show: blocks that fit, and those that reach beyond both ends."""
    for width in (200, 256):
        inputs, how = linear(rows, width, depth, form, dtype, bias=rows == 8)
        inputs[1][:16, :128] = torch.arange(-8, 8)[:, None].roll(1, 0)
        compare("QuantisedLinear", inputs, **how)
    options = dict(activation="silu", y_dtype=0, y_group=0)
    compare("GatedQuantisedLinear", inputs, **how, **options)


@pytest.mark.parametrize("form,rows,width,depth", [
    (WEIGHTS["int4"], 66, 72, 1152), (WEIGHTS["int4"], 256, 128, 128), (WEIGHTS["int4 zero"], 130, 71, 352),
    (Format("int4", 128, symmetric=False), 128, 128, 640), (WEIGHTS["int4 rows"], 140, 40, 544),
    (Format("int4", symmetric=False), 70, 40, 96), *([(Format("int4", 96), 600, 260, 960)] if GPU else []),
])  # fmt: skip
def test_weights_are_scaled_before_many_rows_are_multiplied(form, rows, width, depth):
    """Blocks that fit and those that reach beyond every end, all of the depth and parts; in groups weights are rounded
    to the type of x, as DequantizeLinear has it."""

    def wanted(name):
        return name.startswith("scaled")

    inputs, how = linear(rows, width, depth, form, bias=rows != 128)
    names = compare("QuantisedLinear", inputs, **how, wanted=wanted)
    assert depth != 1152 or {name[-6:] for name in names} == {"parts1", "parts2"}
    if rows in (66, 128) or GPU and width % 2 == 0:
        options = dict(activation="silu", y_dtype=0, y_group=0)
        compare("GatedQuantisedLinear", inputs, **how, **options, wanted=lambda name: name == names[-1])


def test_scaled_tiles_stay_in_registers():
    """The largest: wgmma takes weights from registers, no register is spilled, memory suffices."""
    inputs = Tensor((256, 4096), "bfloat16"), Tensor((4096, 4096), "int4"), Tensor((4096, 32), "float32")
    y, attributes = Tensor((256, 4096), "bfloat16"), {"dtype": 16, "group": 128, "x_group": 0}
    site = Site("QuantisedLinear", attributes, (*inputs, None, None, None), (y,), Device(90))
    scaled = {
        t.name.split()[1]: t.launches[-1].kernel for t in tactics_of(site.op)(site) if t.name.startswith("scaled")
    }
    assert list(scaled) == ["256x128x64", "128x128x64"]
    for cubin in compile_all(list(scaled.values()), 90).values():
        assert isinstance(cubin, Cubin) and cubin.shared <= 227 << 10, cubin
        code = disassembled(cubin.data)
        assert re.search(r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+, gdesc", code)
        assert not re.search(r"\b(STL|LDL)\b", code)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scaled_half_bytes_on_the_gpu(dtype, symmetric):
    """What PTX computes, the interpreter does not show: every number, with scales of all sizes."""
    for rows in (70, 128, 300):
        inputs, how = linear(rows, 256, 640, Format("int4", 128, symmetric=symmetric), dtype)
        inputs[1][:16, :128] = torch.arange(-8, 8, dtype=torch.int8)[:, None].roll(1, 0)
        inputs[2] *= 2.0 ** torch.randint(-3, 4, inputs[2].shape)
        compare("QuantisedLinear", inputs, **how, wanted=lambda name: name.startswith("scaled"))


def test_fp8_weights_where_the_hardware_does_not_know_them():
    inputs, how = linear(2, 40, 256, WEIGHTS["fp8"])
    every = torch.arange(256, dtype=torch.uint8)
    every[every & 127 == 127] = 0  # NaN
    inputs[1][0] = every.view(torch.float8_e4m3fn)  # subnormal numbers and both zeros, too
    compare("QuantisedLinear", inputs, **how, device=Device(80))


def test_fp8_is_not_multiplied_where_the_hardware_does_not():
    inputs, how = linear(20, 40, 256, WEIGHTS["fp8"], activation=Format("fp8_e4m3"))
    shapes = tuple(map(described, inputs))
    site = Site("QuantisedLinear", {k: v for k, v in how.items() if k != "int4"}, shapes,
                (Tensor((20, 40), "float16"),), Device(80))  # fmt: skip
    assert {t.name.split(",")[0] for t in tactics_of("QuantisedLinear")(site)} == {"dequantised"}


@pytest.mark.parametrize("weight,activation", [("int4", None), ("int4 zero", None), ("fp8", Format("fp8_e4m3"))])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("quantised", [0, TYPES["int8"]])
def test_a_product_and_its_activation(weight, activation, rows, quantised):
    inputs, how = linear(rows, 32, 256, WEIGHTS[weight], activation=activation, bias=rows == 20)
    options = dict(activation="silu", y_dtype=quantised, y_group=0, few=0.3 if quantised else 0)
    names = compare("GatedQuantisedLinear", inputs, **how, **options)
    assert {", then" in name for name in names} == ({True} if quantised else {True, False})


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("columns,group", [
    (70, 0), (256, 128), (200, 64), (30, 10), (2100, 0), *([(14336, 0)] if GPU else []),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_tokens_are_quantised(kind, columns, group, dtype):
    x = (torch.randn(4, columns) * 10.0 ** torch.arange(-3, 1)[:, None]).to(dtype)
    x[1] = 0
    compare("QuantiseTokens", [x], dtype=TYPES[kind], group=group)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("group", [0, 64])
def test_norms_and_activations_end_in_eight_bits(kind, group):
    """Rounding a neighbour away is allowed: sums of squares and exponentials differ in the last bit."""
    x, residual, weight = torch.randn(3, 192), torch.randn(3, 192), torch.randn(192)
    how = dict(dtype=TYPES[kind], group=group)
    norm = dict(epsilon=1e-5, weight_offset=0.0, fp32_multiply=0)
    for other in (None, residual.to(HALF)):
        compare("QuantisedRMSNorm", [x.to(HALF), weight.to(HALF), other], **how, **norm)
    compare("QuantisedGatedActivation", [(torch.randn(3, 400) * 3).to(HALF)], activation="gelu_tanh", **how)


@pytest.mark.parametrize("form", [
    WEIGHTS["int4 zero"], WEIGHTS["int8"], WEIGHTS["fp8"], Format("int8", rows=0), Format("int4", 8), Format("int4"),
    Format("int4", 4),
])  # fmt: skip
@pytest.mark.parametrize("capability", [80, 90])
def test_rows_of_a_table_are_dequantised(form, capability):
    stored = round_to_nearest(torch.randn(6, 64), form)
    scale = stored.scale if form.group else stored.scale.reshape(-1 if form.rows else ())
    attributes = {"axis": 1, "block_size": form.group} if form.group else {"axis": 0}
    attributes["output_dtype"] = ONNX[HALF]
    zero = [] if stored.zero is None else [stored.zero]
    expected = bind_dequantize(attributes, ())(stored.values, scale, *zero)
    int4 = form.dtype == "int4"
    inputs = [stored.values, scale, *zero]
    shapes = tuple(Tensor(tuple(x.shape), "int4") if int4 and i != 1 else described(x) for i, x in enumerate(inputs))
    site = Site("DequantizeLinear", attributes, shapes, (described(expected),), Device(capability))
    (tactic,) = tactics_of("DequantizeLinear")(site)
    on_device = [(packed(x) if int4 and i != 1 else x).to(DEVICE) for i, x in enumerate(inputs)]
    assert torch.equal(run_tactic(tactic, on_device, site.outputs)[0].cpu(), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_one_scale_for_all(kind):
    x, stored = torch.randn(5, 300).to(HALF), {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}[kind]
    scale = torch.tensor(0.013)
    site = Site("QuantizeLinear", {}, (described(x), described(scale)), (Tensor((5, 300), str(stored)[6:]),), Device())
    (tactic,) = tactics_of("QuantizeLinear")(site)
    (values,) = run_tactic(tactic, [x.to(DEVICE), scale.to(DEVICE)], site.outputs)
    assert torch.equal(values.cpu().float(), round_to(x.float() / scale, stored).float())


def test_rows_of_a_packed_table_are_gathered():
    numbers, index = torch.randint(-8, 8, (9, 34), dtype=torch.int8), torch.tensor([8, 0, 3], dtype=torch.int32)
    shapes = Tensor((9, 34), "int4"), described(index)
    (tactic,) = tactics_of("Gather")(Site("Gather", {}, shapes, (Tensor((3, 34), "int4"),), Device()))
    (found,) = run_tactic(tactic, [packed(numbers).to(DEVICE), index.to(DEVICE)], [Tensor((3, 17), "uint8")])
    assert torch.equal(found.cpu().flatten(), packed(numbers[index.long()]))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 64, 1000])
def test_fp8_by_cublaslt(rows):
    torch.cuda.synchronize()  # makes a context current, in which cuBLASLt starts
    if missing := cublas.why_missing():
        pytest.skip(missing)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a factor for each row is a thing of compute capability 9.0")
    inputs, how = linear(rows, 320, 512, WEIGHTS["fp8"], activation=Format("fp8_e4m3"), bias=rows == 64)
    names = compare("QuantisedLinear", inputs, **how, device=Device(cublas=True))
    assert any(name.startswith("cublas") for name in names), "cuBLASLt proposes nothing"


def test_every_kernel_compiles_for_every_architecture():
    """int4 and int8 everywhere, FP8 where it is multiplied: tactics of a Llama-like layer."""
    x = Tensor((16, 4096), "bfloat16")
    int4 = Tensor((4096, 4096), "int4"), Tensor((4096, 32), "float32")
    one, f8 = Tensor((1, 4096), "bfloat16"), "float8_e4m3fn"

    def product(x, weight, scale, kind=None, capability=90, **groups):
        x_scale = Tensor((x.shape[0], 1), "float32") if kind else None
        x = Tensor(x.shape, kind or x.dtype)
        attributes = {"dtype": 16, "group": 0, "x_group": 0, **groups}
        outputs = (Tensor((x.shape[0], 4096), "bfloat16"),)
        site = Site("QuantisedLinear", attributes, (x, weight, scale, None, x_scale, None), outputs, Device(capability))
        return tactics_of("QuantisedLinear")(site)[0].launches[0].kernel

    rows = Tensor((4096,), "float32")
    quantise = Site("QuantiseTokens", {"dtype": TYPES["fp8_e4m3"], "group": 0}, (x,),
                    (Tensor(x.shape, f8), Tensor((16, 1), "float32")))  # fmt: skip
    for capability in (80, 89, 90, 100, 120):
        kernels = [
            product(one, *int4, capability=capability, group=128),
            product(x, *int4, capability=capability, group=128),
        ]
        kernels += (
            [product(x, Tensor((4096, 4096), "int8"), rows, "int8", capability)] if capability in (80, 90) else []
        )
        if capability in (89, 90, 120):
            kernels += [product(x, Tensor((4096, 4096), f8), rows, f8, capability)]
            kernels += [tactics_of("QuantiseTokens")(quantise)[0].launches[0].kernel]
        if capability == 90:  # converted in registers, from which its tensor cores read
            kernels += [product(x, Tensor((4096, 4096), kind), rows) for kind in ("int8", f8, "int4")]
        for kernel, cubin in compile_all(kernels, capability).items():
            assert isinstance(cubin, Cubin) and cubin.data[:4] == b"\x7fELF", (kernel, cubin)
