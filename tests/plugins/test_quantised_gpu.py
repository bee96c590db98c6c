"""Every tactic of the quantised ops against the references: on the GPU where there is one, interpreted otherwise."""

import itertools
import os

import pytest
import torch

pytest.importorskip("triton")

from ingot.calibration.formats import Format, round_to_nearest
from ingot.plugins import OPS, tactics_of
from ingot.plugins.onnx_quantise import bind_dequantize
from ingot.plugins.tactic import Device, Site, Tensor
from onnx import TensorProto
from triton_run import DEVICE, described, run_tactic

GPU = DEVICE == "cuda"
TYPES = {"int8": TensorProto.INT8, "fp8_e4m3": TensorProto.FLOAT8E4M3FN}
ONNX = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
# the interpreter multiplies bf16 matrices wrongly, so they are left to the GPU
HALF = torch.bfloat16 if GPU else torch.float16
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    print("seed", torch.initial_seed())  # shown when a test fails


def packed(numbers):
    """int8 numbers -8 .. 7 as ONNX packs them."""
    flat = torch.nn.functional.pad(numbers.flatten(), (0, numbers.numel() % 2)).view(torch.uint8)
    return flat[::2] & 15 | flat[1::2] << 4


def compare(op, inputs, int4=(), device=None, wanted=lambda name: True, **attributes):
    """Runs each tactic; every one equals the reference. int4: inputs that are int4 in int8. Returns the names."""
    expected = OPS[op].reference(*inputs, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [described(y) for y in expected]
    shapes = [Tensor(tuple(x.shape), "int4") if i in int4 else described(x) for i, x in enumerate(inputs)]
    on_device = [None if x is None else (packed(x) if i in int4 else x).to(DEVICE) for i, x in enumerate(inputs)]
    site = Site(op, attributes, tuple(shapes), tuple(outputs), device or Device())
    found = [tactic for tactic in tactics_of(op)(site) if wanted(tactic.name)]
    assert found, "no tactic serves"
    for tactic in found:
        for ours, theirs in zip(run_tactic(tactic, on_device, outputs), expected, strict=True):
            bound = TOLERANCE.get(theirs.dtype, 0)
            if "dequantised" in tactic.name:
                bound *= 2  # rounds the weight, too
            largest = float(theirs.float().abs().max())
            torch.testing.assert_close(ours.cpu().float(), theirs.float(), rtol=bound, atol=bound * largest,
                                       msg=lambda m, t=tactic: f"{t.name}: {m}")  # fmt: skip
    assert len({tactic.name for tactic in found}) == len(found)
    return [tactic.name for tactic in found]


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


def test_a():
    for args in [
        (1, 24, 256, Format("int4", 128)),
        (3, 20, 384, Format("int4", 128, symmetric=False)),
        (1, 24, 256, Format("int8")),
        (1, 24, 256, Format("fp8_e4m3")),
        (20, 70, 256, Format("int4", 128)),
        (20, 70, 256, Format("int4", 128, symmetric=False)),
        (20, 70, 200, Format("int8")),
        (20, 70, 200, Format("fp8_e4m3")),
        (2, 70, 200, Format("int8", 50)),
    ]:
        inputs, how = linear(*args, bias=True)
        print(args, compare("QuantisedLinear", inputs, **how))
    for rows in (1, 20, 70):
        for w, a in [
            (Format("int8"), Format("int8")),
            (Format("fp8_e4m3"), Format("fp8_e4m3")),
            (Format("fp8_e4m3"), Format("fp8_e4m3", rows=0)),
            (Format("fp8_e4m3", 128, 128), Format("fp8_e4m3", 128)),
            (Format("int4", 64), Format("int8")),
        ]:
            inputs, how = linear(rows, 70, 256, w, activation=a)
            print(rows, w, a, compare("QuantisedLinear", inputs, **how))
