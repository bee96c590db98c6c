"""The quantised ops against what calibration measures and what the standard Q/DQ nodes around a Linear compute."""

import pytest
import torch
from ingot.calibration.formats import Format, round_to_nearest
from ingot.plugins.onnx_quantise import bind_dequantize
from ingot.plugins.quantise_tokens import quantise_tokens
from ingot.plugins.quantised_linear import quantised_linear
from onnx import TensorProto

TYPES = {"int8": TensorProto.INT8, "fp8_e4m3": TensorProto.FLOAT8E4M3FN}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [0, 16, 128])
def test_tokens_are_rounded_as_calibration_rounds(dtype, group):
    x = torch.randn(7, 48 if group == 16 else 256) * 10.0 ** torch.arange(-3, 4)[:, None]
    x[3] = 0
    values, scale = quantise_tokens(x, dtype=TYPES[dtype], group=group)
    expected = round_to_nearest(x, Format(dtype, group))
    assert torch.equal(scale, expected.scale)
    assert torch.equal(values.float(), expected.values.float()) and values.dtype == expected.values.dtype


@pytest.mark.parametrize("weight", [
    Format("int4", 16), Format("int4", 16, symmetric=False), Format("int8"), Format("fp8_e4m3"), Format("int8", 48),
])  # fmt: skip
@pytest.mark.parametrize("x_group", [None, 0, 16])
def test_a_product_is_that_of_the_dequantised(weight, x_group):
    w, x, bias = torch.randn(10, 48), torch.randn(5, 48), torch.randn(10)
    stored = round_to_nearest(w, weight)
    scale = stored.scale if weight.group else stored.scale[:, 0]
    attributes = {"axis": 1, "block_size": weight.group} if weight.group else {"axis": 0}
    numbers = bind_dequantize(attributes, ())(stored.values, scale, stored.zero)
    assert torch.equal(numbers, stored.dequantise())
    expected, x_scale = x, None
    if x_group is not None:
        x, x_scale = quantise_tokens(x, dtype=TensorProto.INT8, group=x_group)
        expected = bind_dequantize({"axis": 1, "block_size": x_group or 48}, ())(x, x_scale)
    y = quantised_linear(
        x, stored.values, scale, stored.zero, x_scale, bias,
        dtype=TensorProto.FLOAT, group=weight.group, x_group=x_group or 0,
    )  # fmt: skip
    torch.testing.assert_close(y, expected @ numbers.T + bias, atol=1e-4, rtol=1e-4)
