"""Observers see batches; what they say must be what all the data at once says, in any order."""

import itertools
import math

import pytest
import torch
from ingot.calibration import QuantisationError
from ingot.calibration.formats import Format
from ingot.calibration.observers import MSE, OBSERVERS, AbsMax, Entropy, Histogram, Percentile

INT8 = Format("int8")


def activations(tokens: int = 3000, columns: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator) * torch.logspace(-3, 2, columns)
    x[7, 2] = 70.0  # an outlier of its column
    return x


def batches(x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """x in pieces of unequal length, the rows in random order."""
    generator = torch.Generator().manual_seed(seed)
    return list(x[torch.randperm(len(x), generator=generator)].split([1, 999, 300, len(x) - 1300]))


def seen(observer, pieces):
    for piece in pieces:
        observer.update(piece)
    return observer


def test_absmax():
    x = activations()
    assert seen(AbsMax(), batches(x, 0)).scale(INT8) == x.abs().max() / 127.5
    assert torch.equal(seen(AbsMax(channels=True), batches(x, 0)).scale(Format("fp8_e4m3")), x.abs().amax(0) / 448)


@pytest.mark.parametrize("channels", [False, True])
def test_a_histogram_grown_by_batches_is_that_of_all_data(channels):
    x = activations()
    whole = seen(Histogram(channels, 512), [x])
    for seed in range(3):
        grown = seen(Histogram(channels, 512), batches(x, seed))
        assert torch.equal(grown.counts, whole.counts) and torch.equal(grown.width, whole.width)
    columns = x.abs() if channels else x.abs().reshape(-1, 1)
    for c in range(columns.shape[1]):
        width = float(whole.width[c])
        assert width * 512 / 2 <= columns[:, c].max() < width * 512  # a power of two above the largest
        assert torch.equal(whole.counts[c], torch.bincount((columns[:, c].double() / width).long(), minlength=512))


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("channels", [False, True])
def test_the_order_of_batches_does_not_matter(name, channels):
    x = activations(columns=3)
    first, second = (seen(OBSERVERS[name](channels=channels), batches(x, seed)).scale(INT8) for seed in (1, 2))
    assert torch.equal(first, second)
    assert first.shape == ((3,) if channels else ()) and first.dtype == torch.float32 and (first > 0).all()


@pytest.mark.parametrize("percent", [50.0, 99.0, 99.97, 100.0])
def test_percentile_is_within_a_bin(percent):
    x = activations()
    observer = seen(Percentile(percent=percent, num_bins=8192), batches(x, 0))
    ordered = x.abs().reshape(-1).sort().values
    expected = ordered[math.ceil(len(ordered) * percent / 100) - 1]
    width = float(observer.histogram.width)
    assert abs(float(observer.scale(INT8)) * 127.5 - float(expected)) <= width * 1.001
    each = seen(Percentile(channels=True, percent=percent, num_bins=8192), batches(x, 0))
    expected = x.abs().sort(0).values[math.ceil(len(x) * percent / 100) - 1]
    assert ((each.scale(INT8) * 127.5 - expected).abs() <= each.histogram.width * 1.001).all()


@pytest.mark.parametrize("format", [Format("int8"), Format("int4"), Format("fp8_e4m3")], ids=str)
@pytest.mark.parametrize("tail", [False, True])
def test_mse_is_near_the_best_range_of_all(format, tail):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5000, 1, generator=generator)
    x = x**3 if tail else x

    def error(scale) -> float:
        return float((format.round(x / scale) * scale - x).square().mean())

    found = float(seen(MSE(), x.split(900)).scale(format))
    least = min(error(float(x.abs().max()) / format.reach * ratio / 100) for ratio in range(3, 101))
    assert error(found) <= least * 1.03
    if format.dtype == "int4":
        assert error(found) < 0.7 * error(float(x.abs().max()) / format.reach)


def test_entropy_is_the_calibrator_written_out():
    """Against the loops of the paper, number by number, on the same histogram."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5000, 1, generator=generator)
    x[0] = 12.0
    observer = seen(Entropy(num_bins=256, stride=4), x.split(700))
    counts, width = observer.histogram.counts[0].double().tolist(), float(observer.histogram.width)
    divergences = {}
    last = int(float(x.abs().max()) / width) + 1
    for bins in range(last, 127, -4):
        p = counts[: bins - 1] + [sum(counts[bins - 1 :])]
        levels = [min(round((i + 0.5) * 127.5 / bins), 127) for i in range(bins)]
        q = [0.0] * bins  # half a count where P has some and Q would have none
        for _, group in itertools.groupby(range(bins), key=lambda i: levels[i]):
            members = list(group)
            alive = [i for i in members if p[i] > 0]
            for i in alive:
                q[i] = max(sum(counts[j] for j in members) / len(alive), 0.5)
        divergences[bins] = sum(
            a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a > 0
        )
    best = min(divergences, key=lambda bins: divergences[bins])
    assert float(observer.scale(INT8)) == pytest.approx(min(best * width, 12.0) / 127.5)


def test_entropy_and_mse_cut_outliers_off_and_absmax_does_not():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50000, 1, generator=generator)
    x[0] = 100.0
    ranges = {name: float(seen(OBSERVERS[name](), [x]).scale(INT8)) * 127.5 for name in OBSERVERS}
    assert ranges["absmax"] == pytest.approx(100) and 3 < ranges["percentile"] < 5
    assert 3 < ranges["entropy"] < 20 and 50 < ranges["mse"] < 95


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("channels", [False, True])
def test_zeros_one_token_tiny_and_huge_numbers(name, channels):
    observer = OBSERVERS[name](channels=channels)
    observer.update(torch.zeros(4, 2))
    assert (observer.scale(INT8) == 1).all()
    observer.update(torch.zeros(0, 2))
    observer.update(torch.tensor([[1e-30, 0.0]]))
    assert (observer.scale(INT8) > 0).all()
    observer.update(torch.tensor([[3.0, 0.0]], dtype=torch.float16))
    observer.update(torch.tensor([[2e38, 0.0]], dtype=torch.bfloat16))
    assert observer.scale(INT8).isfinite().all() and (observer.scale(INT8) > 0).all()
    if channels:
        assert observer.scale(INT8)[1] == 1


@pytest.mark.parametrize("name", OBSERVERS)
def test_what_cannot_be_is_one_sentence(name):
    for bad, words in ((float("nan"), "1 NaN"), (float("inf"), "1 infinite"), (-float("inf"), "1 infinite")):
        with pytest.raises(QuantisationError, match=words):
            OBSERVERS[name]().update(torch.tensor([[1.0, bad]]))
    with pytest.raises(QuantisationError, match="no batch was seen"):
        OBSERVERS[name]().scale(INT8)
    with pytest.raises(QuantisationError, match="must be symmetric"):
        seen(OBSERVERS[name](), [torch.ones(1, 1)]).scale(Format("int8", symmetric=False))
    with pytest.raises(QuantisationError, match="percentile must be"):
        Percentile(percent=0)
