"""GPTQ against a slow, obviously correct form of itself, and against rounding to nearest."""

import pytest
import torch
from ingot.calibration import QuantisationError
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.gptq import Hessian, gptq

FORMATS = [
    Format("int4", 16),
    Format("int4", 16, symmetric=False),
    Format("int4"),
    Format("int8"),
    Format("fp8_e4m3"),
    Format("fp8_e4m3", 16, 8),
]


def inputs(tokens: int, columns: int, rank: int = 8, spread: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Correlated activations, as layers see them, with columns of unequal size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, rank, generator=g) @ torch.randn(rank, columns, generator=g) / rank**0.5
    x = x + 0.3 * torch.randn(tokens, columns, generator=g)
    return x * torch.exp(spread * torch.randn(columns, generator=g))


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: torch.Tensor, dtype=torch.float32, pieces: int = 64) -> Hessian:
    hessian = Hessian(dtype)
    for batch in x.split(pieces):
        hessian.update(batch)
    return hessian


def error(x: torch.Tensor, weight: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((x @ (weight - rounded).T).norm() / (x @ weight.T).norm())


def test_hessian_is_twice_the_gram_matrix_whatever_the_batches():
    x = inputs(300, 24)
    expected = 2 * x.double().T @ x.double()
    for pieces in (1, 77, 300):
        hessian = hessian_of(x, pieces=pieces)
        assert hessian.num_samples == 300
        assert torch.allclose(hessian.matrix.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.allclose(hessian_of(x, torch.float64).matrix, expected, rtol=1e-12)
    half = hessian_of(x.half())
    assert half.matrix.dtype == torch.float32 and torch.allclose(half.matrix, expected.float(), rtol=0.01, atol=2)


def brain_surgeon(weight, x, format, damp, order):
    """Optimal Brain Quantization in a given order, row by row: arXiv:2208.11580, equations 2 and 3.

    Rounds one number, moves all that are left by what the inverse Hessian of those says, takes it out of the inverse.
    """
    num_rows, num_columns = weight.shape
    h = 2 * x.double().T @ x.double()
    h += damp * h.diagonal().mean() * torch.eye(num_columns, dtype=torch.float64)
    group = format.group or num_columns
    scales = round_to_nearest(weight, format)
    result = torch.zeros_like(weight, dtype=torch.float64)
    rest = weight.double().clone()
    left = list(order)
    scale, zero = scales.scale, scales.zero
    while left:
        q, g = left[0], left[0] // group
        inverse = torch.linalg.inv(h[left][:, left])
        for row in range(num_rows):
            s = scale[row // (format.rows or num_rows), g].double()
            z = 0 if zero is None else zero[row, g].double()
            stored = rest[row, q] / s
            stored = format.round(stored.round() + z) if format.integer else format.round(stored)
            result[row, q] = (stored - z) * s
            rest[row, left] -= (rest[row, q] - result[row, q]) / inverse[0, 0] * inverse[0]
        left = left[1:]
    return result.float()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_is_optimal_brain_quantisation(format, act_order):
    x, weight = inputs(200, 48), weights(10, 48)
    hessian = hessian_of(x, torch.float64)
    order = hessian.matrix.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(48))
    expected = brain_surgeon(weight, x, format, 0.01, order)
    for block in (48, 16, 7):
        quantised, columns = gptq(weight, hessian, format, act_order=act_order, block=block)
        assert torch.allclose(quantised.dequantise(), expected, rtol=1e-5, atol=1e-7)
        assert columns is None if not act_order else columns.tolist() == order
        assert quantised.values.shape == (10, 48) and quantised.scale.shape == format.scale_shape(10, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_output_is_nearer_than_with_rounding_to_nearest(format, dtype):
    x, weight = inputs(512, 128), weights(64, 128).to(dtype)
    hessian = hessian_of(x)
    nearest = error(x, weight.float(), round_to_nearest(weight, format).dequantise())
    for act_order in (False, True):
        quantised, _ = gptq(weight, hessian, format, act_order=act_order)
        assert error(x, weight.float(), quantised.dequantise()) < 0.7 * nearest
    held_out = inputs(512, 128, seed=0)[:256]
    assert error(held_out, weight.float(), quantised.dequantise()) < 0.7 * nearest


def test_act_order_helps_where_columns_differ():
    x, weight = inputs(1024, 128, spread=1.5), weights(64, 128)
    hessian, format = hessian_of(x), Format("int4", 32)
    plain, sorted_ = (
        error(x, weight, gptq(weight, hessian, format, act_order=a)[0].dequantise()) for a in (False, True)
    )
    assert sorted_ < 0.85 * plain


@pytest.mark.parametrize("act_order", [False, True])
def test_scales_are_those_of_the_weight_and_its_clip(act_order):
    x, weight, format = inputs(256, 64, spread=1.5), weights(8, 64), Format("int4", 16, symmetric=False)
    clip = torch.ones(8, 4)
    clip[:, 0], clip[:, 2] = 0.5, 0.75
    quantised, order = gptq(weight, hessian_of(x), format, act_order, clip=clip)
    nearest = round_to_nearest(weight, format, clip=clip)
    assert torch.equal(quantised.scale, nearest.scale) and torch.equal(quantised.zero, nearest.zero)
    if act_order:
        assert sorted(order.tolist()) == list(range(64)) and order.tolist() != list(range(64))


def test_without_correlation_it_rounds_to_nearest():
    weight, format = weights(8, 32), Format("int4", 16)
    hessian = hessian_of(torch.eye(32))
    quantised, _ = gptq(weight, hessian, format)
    nearest = round_to_nearest(weight, format)
    assert torch.equal(quantised.values, nearest.values) and torch.equal(quantised.scale, nearest.scale)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_one_sample_and_no_input_at_all(act_order):
    weight, format = weights(8, 32), Format("int4", 16)
    nearest = round_to_nearest(weight, format)
    x = inputs(100, 32)
    x[:, 5] = 0
    quantised, _ = gptq(weight, hessian_of(x), format, act_order)
    scale = quantised.scale[:, 5 // 16]
    assert ((quantised.dequantise()[:, 5] - weight[:, 5]).abs() <= scale * 0.5001).all()  # it may live elsewhere
    one, _ = gptq(weight, hessian_of(x[:1]), format, act_order)
    assert error(x[:1], weight, one.dequantise()) < 0.5 * error(x[:1], weight, nearest.dequantise())
    nothing, _ = gptq(weight, hessian_of(torch.zeros(3, 32)), format, act_order)
    assert torch.equal(nothing.values, nearest.values)


def test_rows_of_zeros_stay_zero():
    weight = weights(4, 32)
    weight[2] = 0
    for format in FORMATS:
        quantised, _ = gptq(weight, hessian_of(inputs(100, 32)), format)
        assert (quantised.dequantise()[2] == 0).all() and (quantised.scale > 0).all()


def test_more_damping_where_the_matrix_is_not_positive():
    x = inputs(64, 32)
    hessian = hessian_of(x)
    hessian.matrix.diagonal().sub_(hessian.matrix.diagonal().mean() * 0.05)  # what rounding errors do, overdone
    assert torch.linalg.eigvalsh(hessian.matrix + 0.01 * hessian.matrix.diagonal().mean() * torch.eye(32)).min() < 0
    quantised, _ = gptq(weights(8, 32), hessian, Format("int4", 16))
    assert quantised.dequantise().isfinite().all()


def test_what_cannot_be_is_one_sentence():
    weight, hessian = weights(4, 32), hessian_of(inputs(64, 32))
    with pytest.raises(QuantisationError, match="1 NaN"):
        hessian.update(torch.full((1, 1), float("nan")))
    with pytest.raises(QuantisationError, match="no batch was seen"):
        gptq(weight, Hessian(), Format("int4"))
    with pytest.raises(QuantisationError, match="group size of 24 does not divide"):
        gptq(weight, hessian, Format("int4", 24))
    with pytest.raises(QuantisationError, match="32 columns is not of a weight of 16"):
        gptq(weight[:, :16], hessian, Format("int4"))
    with pytest.raises(QuantisationError, match="infinite"):
        gptq(weight / 0, hessian, Format("int4"))
    hessian.matrix.neg_()
    with pytest.raises(QuantisationError, match="cannot invert the Hessian of 32 columns and 64 tokens"):
        gptq(weight, hessian, Format("int4"))
