"""A quantised tensor is what its format and ONNX say it is."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.calibration import QuantisationError
from ingot.calibration.formats import FP8, Format, Quantised, round_to_nearest
from ingot.engines.errors import BuildError
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

INTEGERS = [Format(d, g, symmetric=s) for d in ("int4", "int8") for g in (0, 8) for s in (True, False)]
FORMATS = [*INTEGERS, Format("fp8_e4m3"), Format("fp8_e4m3", 8), Format("fp8_e4m3", 128, 128), Format("int8", 0, 0)]


def matrix(seed: int, rows: int, columns: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp(spread * torch.randn(rows, 1, generator=generator))


def per_number(quantised: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each number, by the definition: numbers i // rows, j // group share them."""
    n, k = quantised.values.shape
    i = torch.arange(n) // (quantised.format.rows or n)
    j = torch.arange(k) // (quantised.format.group or k)
    scale = quantised.scale[i][:, j]
    return scale, torch.zeros(n, k) if quantised.zero is None else quantised.zero[i][:, j].float()


@pytest.mark.parametrize(
    ("format", "lowest", "highest"), [("int4", -8, 7), ("int8", -128, 127), ("fp8_e4m3", -448, 448)]
)
def test_range(format, lowest, highest):
    assert (Format(format).lowest, Format(format).highest) == (lowest, highest)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS + [Format("int8", 0, 0), Format("int8", 0, 3)]),
    st.integers(0, 2**31),
    st.integers(1, 7),
    st.sampled_from([8, 24]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_integer_moves_by_more_than_half_its_scale(format, seed, rows, columns, dtype):
    weight = matrix(seed, rows, columns).to(dtype)
    quantised = round_to_nearest(weight, format)
    scale, _ = per_number(quantised)
    assert quantised.values.dtype == torch.int8 and quantised.values.shape == weight.shape
    assert quantised.scale.shape == format.scale_shape(rows, columns) and (quantised.scale > 0).all()
    assert format.lowest <= quantised.values.min() and quantised.values.max() <= format.highest
    assert ((quantised.dequantise() - weight.float()).abs() <= scale * 0.5001).all()
    again = round_to_nearest(quantised.dequantise(), format, quantised.scale, quantised.zero)
    assert torch.equal(again.values, quantised.values)


@pytest.mark.parametrize("format", INTEGERS)
def test_scales_are_no_wider_than_the_numbers_need(format):
    weight = matrix(3, 32, 64)
    quantised = round_to_nearest(weight, format)
    values = quantised.values.reshape(32, -1, format.group or 64)
    if format.symmetric:  # one end is reached
        assert (values.float().abs().amax(2) >= format.highest).all()
    else:  # from end to end, 0 included, less one where the zero point was rounded
        values = torch.cat([values, quantised.zero[..., None]], 2).float()
        assert (values.amax(2) - values.amin(2) >= format.highest - format.lowest - 1).all()


def test_fp8_is_torchs_rounding_and_saturates():
    x = torch.cat([torch.linspace(-448, 448, 4001), torch.tensor([0.0, 2**-9, 2**-10, 2**-10 * 1.01, 3e-3])])[None]
    one = torch.ones(())
    assert torch.equal(round_to_nearest(x, Format("fp8_e4m3"), one).dequantise(), x.to(FP8).float())
    beyond = round_to_nearest(torch.tensor([[449.0, 1e30, -500.0]]), Format("fp8_e4m3"), one).dequantise()
    assert beyond.tolist() == [[448, 448, -448]]
    weight = matrix(5, 16, 48)
    quantised = round_to_nearest(weight, Format("fp8_e4m3"))
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert torch.equal(quantised.values.float(), (weight / scale).to(FP8).float())
    error = (quantised.dequantise() - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, scale * 2**-10) * 1.0001).all()  # three bits behind the point


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("format", [f for f in FORMATS if f.rows != 128], ids=str)
def test_dequantise_is_onnx_dequantize_linear(format, seed):
    quantised = round_to_nearest(matrix(seed, 6, 24), format)
    element = {"int4": TensorProto.INT4, "int8": TensorProto.INT8, "fp8_e4m3": TensorProto.FLOAT8E4M3FN}[format.dtype]
    scale, zero = quantised.scale.numpy(), quantised.zero
    if not format.group:  # a scale for each row, or for everything
        scale = scale.reshape(-1) if format.rows else scale.reshape(())
        zero = None if zero is None else zero.reshape(-1)
    attributes = {"axis": 1, "block_size": format.group} if format.group else {"axis": 0}
    inputs = ["x", "scale"] + ([] if zero is None else ["zero"])
    constants = [stored("x", element, quantised.values), onnx.numpy_helper.from_array(scale, "scale")]
    if zero is not None:
        constants.append(stored("zero", element, zero))
    node = helper.make_node("DequantizeLinear", inputs, ["y"], **attributes)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 24])
    graph = helper.make_graph([node], "g", [], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    onnx.checker.check_model(model, full_check=True)
    (expected,) = ReferenceEvaluator(model).run(None, {})
    assert np.array_equal(quantised.dequantise().numpy(), expected)


def stored(name: str, element: int, values: torch.Tensor) -> TensorProto:
    dtype = helper.tensor_dtype_to_np_dtype(element)
    array = values.view(torch.uint8).numpy().view(dtype) if values.dtype == FP8 else values.numpy().astype(dtype)
    return onnx.numpy_helper.from_array(array, name)


@pytest.mark.parametrize("shape", [(300, 200), (128, 128), (5, 7), (1, 129)])
def test_blocks_may_be_cut_off_at_the_edges(shape):
    format, weight = Format("fp8_e4m3", 128, 128), matrix(7, *shape)
    quantised = round_to_nearest(weight, format)
    n, k = -(-shape[0] // 128), -(-shape[1] // 128)
    assert quantised.scale.shape == (n, k)
    for i in range(n):
        for j in range(k):
            block = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            scale = weight[block].abs().max() / 448
            assert quantised.scale[i, j] == scale
            assert torch.equal(quantised.dequantise()[block], (weight[block] / scale).to(FP8).float() * scale)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_of_zeros_of_one_number_and_of_tiny_ones(format):
    weight = torch.stack([torch.zeros(8), torch.full((8,), 0.37), torch.full((8,), -2.0), torch.full((8,), 1e-42)])
    quantised = round_to_nearest(weight, format)
    scale, _ = per_number(quantised)
    assert (quantised.scale > 0).all() and quantised.scale.isfinite().all()
    back = quantised.dequantise()
    assert (back[0] == 0).all()
    assert ((back - weight).abs() <= scale * (0.5001 if format.integer else 16.0)).all()
    if not format.symmetric:
        assert torch.allclose(back[:3], weight[:3], rtol=1e-6)  # zero to the number: it is the end of the range
    assert (round_to_nearest(torch.zeros(4, 8), format).scale == 1).all()


def test_largest_floats_do_not_overflow():
    weight = torch.tensor([[3.1e38, -3.1e38] * 4])
    for format in FORMATS:
        assert round_to_nearest(weight, format).scale.isfinite().all()
        assert torch.allclose(round_to_nearest(weight, format).dequantise(), weight, rtol=0.08)


def test_clip_shrinks_the_range_of_each_block():
    weight = matrix(11, 4, 16)
    clip = torch.tensor([[0.5, 1.0]]).expand(4, 2)
    for format in (Format("int4", 8), Format("int4", 8, symmetric=False), Format("fp8_e4m3", 8)):
        whole = round_to_nearest(weight, format)
        half, both = round_to_nearest(weight, format, clip=0.5), round_to_nearest(weight, format, clip=clip)
        assert torch.allclose(half.scale, whole.scale / 2)
        assert torch.equal(both.scale[:, 1], whole.scale[:, 1]) and torch.equal(both.scale[:, 0], half.scale[:, 0])


def test_dequantise_rounds_once_to_the_dtype_asked_for():
    quantised = round_to_nearest(matrix(2, 4, 16), Format("int4", 8))
    assert torch.equal(quantised.dequantise(torch.bfloat16), quantised.dequantise().bfloat16())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: round_to_nearest(torch.ones(2, 12), Format("int4", 8)), "group size of 8 does not divide the 12"),
        (lambda: round_to_nearest(torch.tensor([[1.0, float("nan")]]), Format("int8")), "1 NaN and 0 infinite"),
        (lambda: round_to_nearest(torch.tensor([[1.0, float("inf")]]), Format("int8")), "0 NaN and 1 infinite"),
        (lambda: round_to_nearest(torch.ones(1, 2), Format("int8"), torch.tensor(0.0)), "above 0"),
        (lambda: Format("int3"), "no such number format: int3"),
        (lambda: Format("int4", -1), "group must be a whole number from 0"),
        (lambda: Format("fp8_e4m3", symmetric=False), "no zero points"),
    ],
)
def test_what_cannot_be_is_one_sentence(call, sentence):
    with pytest.raises(QuantisationError, match=sentence) as raised:
        call()
    assert isinstance(raised.value, BuildError) and "\n" not in str(raised.value)


def test_blocks_larger_than_the_matrix_take_no_more_than_it():
    x = torch.randn(5, 7)
    large, whole = Format("fp8_e4m3", group=1 << 30, rows=1 << 30), Format("fp8_e4m3", rows=0)
    found, expected = round_to_nearest(x, large), round_to_nearest(x, whole)
    assert torch.equal(found.dequantise(), expected.dequantise()) and found.scale.shape == (1, 1)
