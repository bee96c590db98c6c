"""SmoothQuant changes nothing but what is rounded, and rounds less away where channels have outliers."""

import pytest
import torch
from ingot.calibration import QuantisationError
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.smoothquant import INT8, search_smoothing, smoothing


def inputs(outliers: int = 4, size: float = 60.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(outliers)
    x = torch.randn(256, 96, generator=g)
    x[:, torch.randperm(96, generator=g)[:outliers]] *= size
    return x


def weights() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return [0.05 * torch.randn(n, 96, generator=g) for n in (40, 16)]


def w8a8_error(x, pair, s, activation=INT8, weight=INT8) -> float:
    rounded = round_to_nearest(x / s, activation).dequantise()
    outputs = [rounded @ round_to_nearest(w * s, weight).dequantise().T - x @ w.T for w in pair]
    return sum(float(y.square().sum()) for y in outputs)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_what_leaves_the_input_is_in_the_weight(alpha):
    x, pair = inputs().double(), [w.double() for w in weights()]
    s = smoothing(x.abs().amax(0), pair, alpha)
    assert s.shape == (96,) and s.dtype == torch.float32
    for w in pair:
        assert torch.allclose((x / s.double()) @ (w * s.double()).T, x @ w.T, rtol=1e-12, atol=1e-12)


def test_the_papers_formula():
    x, pair = inputs(), weights()
    absmax_x, absmax_w = x.abs().amax(0), torch.cat(pair).abs().amax(0)
    for alpha in (0.0, 0.3, 1.0):
        expected = absmax_x**alpha / absmax_w ** (1 - alpha)
        s = smoothing(absmax_x, pair, alpha)
        assert torch.allclose(s / s[0], expected / expected[0], rtol=1e-5)
        assert s.log().mean().abs() < 1e-5
    half = smoothing(absmax_x, pair, 0.5)  # both sides of the product share the difficulty
    ratio = (absmax_x / half) / (absmax_w * half)
    assert torch.allclose(ratio, ratio[:1].expand(96), rtol=1e-4)


def test_smoothing_helps_w8a8_with_outliers():
    x, pair = inputs(), weights()
    smooth = w8a8_error(x, pair, search_smoothing(pair, x))
    assert smooth < 0.2 * w8a8_error(x, pair, torch.ones(96))


def test_it_is_the_best_of_the_grid():
    x, pair = inputs(8, 10.0), weights()
    static = Format("int8", rows=0)  # one scale for all tokens
    for activation in (INT8, static):
        tried = [smoothing(x.abs().amax(0), pair, a / 10) for a in range(11)]
        errors = [w8a8_error(x, pair, s, activation) for s in tried]
        assert torch.equal(search_smoothing(pair, x, activation, num_grid=10), tried[errors.index(min(errors))])


def test_nothing_is_smoothed_where_that_is_best():
    """Fp8 rounds each number by its own size: moving sizes about gains nothing."""
    x, pair, fp8 = inputs(0), weights(), Format("fp8_e4m3")
    s = search_smoothing(pair, x, fp8, fp8)
    assert w8a8_error(x, pair, s, fp8, fp8) <= w8a8_error(x, pair, torch.ones(96), fp8, fp8)


def test_channels_may_have_to_share():
    x, pair = inputs(), weights()
    s = search_smoothing(pair, x, share=lambda s: s.view(2, 48).log().mean(0).exp().repeat(2))
    assert torch.equal(s[:48], s[48:]) and w8a8_error(x, pair, s) < w8a8_error(x, pair, torch.ones(96))


def test_more_text_than_the_sample_may_say_how_large_channels_are():
    x, pair = inputs(), weights()
    absmax = x.abs().amax(0)
    few = search_smoothing(pair, x[:64])
    assert not torch.equal(few, search_smoothing(pair, x[:64], absmax_x=10 * absmax**2))
    absmax[0] *= 1000
    s = smoothing(absmax, pair, 0.5)
    assert s[0] > 10 * s[1:].median()


def test_channels_that_carry_nothing_and_half_precision():
    x, pair = inputs(), [w.bfloat16() for w in weights()]
    x[:, 4] = 0
    for w in pair:
        w[:, 7] = 0
    s = smoothing(x.half().abs().amax(0), pair, 0.5)
    assert s[4] == 1 and s[7] == 1 and s.isfinite().all() and (s > 0).all()
    assert search_smoothing(pair, x[:1].bfloat16()).isfinite().all()
    assert torch.equal(smoothing(torch.zeros(96), pair, 0.5), torch.ones(96))


def test_infinite_inputs_are_refused():
    with pytest.raises(QuantisationError, match="infinite"):
        search_smoothing(weights(), inputs() / 0)
