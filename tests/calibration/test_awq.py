"""AWQ's two searches: never worse than the weight as it is, and better where channels are salient."""

import pytest
import torch
from ingot.calibration import QuantisationError
from ingot.calibration.awq import output_error, search_clip, search_scales
from ingot.calibration.formats import Format, round_to_nearest

FORMATS = [
    Format("int4", 16),
    Format("int4", 16, symmetric=False),
    Format("int4"),
    Format("int8"),
    Format("fp8_e4m3", 16, 8),
]


def inputs(tokens: int, columns: int, num_salient: int, size: float = 20.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=g)
    x[:, torch.randperm(columns, generator=g)[:num_salient]] *= size
    return x


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scaled_error(weight, x, s, format, clip=1.0) -> float:
    return output_error(weight - round_to_nearest(weight * s, format, clip=clip).dequantise() / s, x)


@pytest.mark.parametrize("num_salient", [0, 2])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_scales_never_make_the_output_worse(format, num_salient):
    x, pair = inputs(200, 64, num_salient), [weights(24, 64), weights(8, 64, seed=2)]
    s = search_scales(pair, x, x.abs().mean(0), format)
    assert s.shape == (64,) and (s > 0).all() and s.isfinite().all()
    ones = torch.ones(64)
    before = sum(scaled_error(w, x, ones, format) for w in pair)
    after = sum(scaled_error(w, x, s, format) for w in pair)
    assert after <= before
    if num_salient and format.dtype == "int4":
        assert after < 0.7 * before


def test_the_scales_are_the_best_of_the_grid():
    x, weight, format = inputs(200, 64, 3), weights(24, 64), Format("int4", 16)
    mean_abs = x.abs().mean(0)
    found = scaled_error(weight, x, search_scales([weight], x, mean_abs, format, num_grid=10), format)
    tried = [scaled_error(weight, x, mean_abs ** (a / 10), format) for a in range(11)]
    assert found == pytest.approx(min(tried), rel=0.01)  # normalising changes ties alone


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_clip_is_the_best_ratio_of_each_block_alone(format):
    x, weight = inputs(100, 64, 2), weights(16, 64)
    weight[::3, ::7] *= 4  # something to clip
    clip = search_clip(weight, x, format, num_grid=10, most=0.5)
    n, k = format.scale_shape(16, 64)
    assert clip.shape == (n, k)
    ratios = [1 - step / 10 for step in range(6)]
    deltas = {r: weight - round_to_nearest(weight, format, clip=r).dequantise() for r in ratios}
    rows, group = 16 // n, 64 // k
    for i in range(n):
        for j in range(k):
            columns = slice(j * group, j * group + group)
            block = slice(i * rows, i * rows + rows)
            errors = {r: float((x[:, columns] @ deltas[r][block, columns].T).square().sum()) for r in ratios}
            assert errors[min(ratios, key=lambda r: abs(r - float(clip[i, j])))] <= min(errors.values()) * 1.0001


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_helps_int4(symmetric):
    x, weight, format = inputs(400, 128, 2), weights(64, 128), Format("int4", 64, symmetric=symmetric)
    ones = torch.ones(128)
    clip = search_clip(weight, x, format)
    assert scaled_error(weight, x, ones, format, clip) < 0.95 * scaled_error(weight, x, ones, format)
    s = search_scales([weight], x, x.abs().mean(0), format)
    both = search_clip(weight * s, x / s, format)
    assert scaled_error(weight, x, s, format, both) < scaled_error(weight, x, s, format)


def test_batches_of_tokens_are_added_up(monkeypatch):
    x, weight, format = inputs(100, 64, 2), weights(16, 64), Format("int4", 16)
    whole = search_clip(weight, x, format), search_scales([weight], x, x.abs().mean(0), format)
    monkeypatch.setattr("ingot.calibration.awq.TOKENS_AT_ONCE", 33)
    assert torch.equal(search_clip(weight, x, format), whole[0])
    assert torch.equal(search_scales([weight], x, x.abs().mean(0), format), whole[1])


def test_half_precision_one_token_dead_channels_and_zeros():
    format = Format("int4", 16)
    x, weight = inputs(50, 32, 2), weights(8, 32)
    x[:, 3] = 0
    weight[2] = 0
    for tokens in (x, x[:1], torch.zeros(4, 32)):
        s = search_scales([weight.bfloat16()], tokens.bfloat16(), tokens.abs().mean(0).bfloat16(), format)
        assert s.dtype == torch.float32 and s.isfinite().all() and (s > 0).all()
        clip = search_clip(weight.half(), tokens.half(), format)
        assert ((clip >= 0.5) & (clip <= 1)).all()
        assert (clip[2] == 1).all()  # nothing to gain, nothing clipped
    assert torch.equal(search_scales([weight], torch.zeros(4, 32), torch.zeros(32), format), torch.ones(32))


def test_what_cannot_be_is_one_sentence():
    x, weight = inputs(10, 32, 0), weights(4, 32)
    for search in (lambda x, w, f: search_scales([w], x, x.abs().mean(0), f), lambda x, w, f: search_clip(w, x, f)):
        with pytest.raises(QuantisationError, match="an activation has 320 NaN"):
            search(x * float("nan"), weight, Format("int4"))
        with pytest.raises(QuantisationError, match="a weight has"):
            search(x, weight / 0, Format("int4"))
        with pytest.raises(QuantisationError, match="group size of 24 does not divide"):
            search(x, weight, Format("int4", 24))
