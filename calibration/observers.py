"""Observers: they see an activation batch by batch, and say which scale it should be stored with.

All but absmax keep a histogram of magnitudes. Its range is a power of two and doubles when a larger number comes,
which merges bins in pairs; so it is exactly the histogram of all data at once, in any order of batches.
An observer sees [T, K] and gives one scale for all of it, or with `channels` one of each column. For one scale per
attention head hand over [T, heads, D] as `x.transpose(1, 2).reshape(T * D, heads)`.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import QuantisationError
from .formats import SMALLEST_SCALE, Format, check_finite

SMALLEST_EXPONENT = -60  # numbers below 2**-60 share the first bins


class Observer(Protocol):
    """What the observers have in common."""

    def update(self, x: Tensor) -> None:
        """Sees x [T, K], any float dtype. A QuantisationError if it has a NaN or an infinity."""

    def scale(self, format: Format) -> Tensor:
        """float32, [] or with `channels` [K], above 0. A QuantisationError if nothing was seen."""


class AbsMax:
    """The largest magnitude: nothing saturates."""

    def __init__(self, channels: bool = False) -> None:
        self.channels = channels
        self._absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        check_finite(x, "an activation")
        if not x.numel():
            return
        absmax = x.abs().amax(0 if self.channels else (0, 1)).float()
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)

    @property
    def absmax(self) -> Tensor:
        """[] or [K] float32: what SmoothQuant wants. A QuantisationError if nothing was seen."""
        if self._absmax is None:
            raise QuantisationError("there is no activation to take a scale from: no batch was seen")
        return self._absmax

    def scale(self, format: Format) -> Tensor:
        return scale_of(self.absmax, format)


class Histogram:
    """Counts of magnitudes in `num_bins` equal bins of [0, 2**exponent), per column or of all: [C, num_bins].

    With `channels` it takes 8 bytes a bin and column: 4096 columns of 2048 bins are 64 MiB.
    """

    def __init__(self, channels: bool, num_bins: int) -> None:
        if num_bins & (num_bins - 1):
            raise ValueError(f"bins are merged in pairs: {num_bins} is no power of two")
        self.extremes, self.num_bins = AbsMax(channels), num_bins
        self.counts = torch.empty(0, dtype=torch.int64)  # [C, num_bins]
        self.exponent = torch.empty(0, dtype=torch.int32)  # [C]

    def update(self, x: Tensor) -> None:
        self.extremes.update(x)
        if not x.numel():
            return
        x = x.float().abs() if self.extremes.channels else x.float().abs().reshape(-1, 1)  # [T, C]
        # frexp: absmax = mantissa * 2**exponent with mantissa < 1, so that absmax itself is inside the range
        exponent = torch.frexp(self.extremes.absmax.reshape(-1)).exponent.clamp(min=SMALLEST_EXPONENT)
        exponent = exponent.where(self.extremes.absmax.reshape(-1) > 0, SMALLEST_EXPONENT)
        if not len(self.counts):
            self.counts = torch.zeros(x.shape[1], self.num_bins, dtype=torch.int64, device=x.device)
        else:
            self._grow(exponent - self.exponent)
        self.exponent = exponent
        index = (torch.ldexp(x, -exponent) * self.num_bins).to(torch.int64)  # exact: powers of two
        index += torch.arange(x.shape[1], device=x.device) * self.num_bins
        self.counts += torch.bincount(index.reshape(-1), minlength=self.counts.numel()).view_as(self.counts)

    def _grow(self, doublings: Tensor) -> None:
        """Doubles the range of each column as often as `doublings` [C] says."""
        target = torch.arange(self.num_bins, device=self.counts.device) >> doublings.clamp(max=62)[:, None]
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, target, self.counts)

    @property
    def width(self) -> Tensor:
        """Width of a bin of each column: [C] float32."""
        return torch.ldexp(torch.full_like(self.exponent, 1 / self.num_bins, dtype=torch.float32), self.exponent)

    @property
    def centres(self) -> Tensor:
        """[C, num_bins] float32."""
        bins = torch.arange(self.num_bins, device=self.counts.device, dtype=torch.float32)
        return (bins + 0.5) * self.width[:, None]

    def scale(self, threshold: Callable[[Format], Tensor], format: Format) -> Tensor:
        """The scale that covers the threshold [C] found, at most what was seen."""
        absmax = self.extremes.absmax
        return scale_of(torch.minimum(threshold(format).reshape(absmax.shape), absmax), format)


class Percentile:
    """The magnitude that `percent` of the numbers do not exceed, to within a bin: a few outliers saturate."""

    def __init__(self, channels: bool = False, percent: float = 99.99, num_bins: int = 4096) -> None:
        if not 0 < percent <= 100:
            raise QuantisationError(f"a percentile must be above 0 and at most 100, not {percent}")
        self.percent, self.histogram = percent, Histogram(channels, num_bins)

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def scale(self, format: Format) -> Tensor:
        return self.histogram.scale(self._threshold, format)

    def _threshold(self, format: Format) -> Tensor:
        below = self.histogram.counts.cumsum(1).double()
        wanted = below[:, -1:] * (self.percent / 100)
        return ((below < wanted).sum(1) + 1) * self.histogram.width  # the upper edge of the bin that gets there


class MSE:
    """The range with the least mean square error, rounding and saturation together, over the histogram.

    Ranges from the largest magnitude down to 1/32 of it are tried, each 2**(1/16) below the one before.
    """

    def __init__(self, channels: bool = False, num_bins: int = 4096) -> None:
        self.histogram = Histogram(channels, num_bins)

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def scale(self, format: Format) -> Tensor:
        return self.histogram.scale(self._threshold, format)

    def _threshold(self, format: Format) -> Tensor:
        centres, counts = self.histogram.centres, self.histogram.counts.float()
        absmax = self.histogram.extremes.absmax.reshape(-1)  # [C]
        return least(
            (threshold, ((_rounded(centres, threshold, format) - centres).square() * counts).sum(1))
            for threshold in (absmax * 2 ** (-step / 16) for step in range(81))
        )


class Entropy:
    """The range whose quantised distribution has the least Kullback-Leibler divergence from the real one.

    TensorRT's calibrator: S. Migacz, "8-bit inference with TensorRT", GTC 2017. P is the histogram with what is beyond
    the range added to its last bin; Q is what is left of the histogram when all bins that round to the same stored
    number share their count evenly, bins that were empty excepted. Every `stride`-th number of bins is tried, down to
    128 of 2048: the range is at least 1/16 of the power of two above the largest magnitude. Meant for int8.
    """

    def __init__(self, channels: bool = False, num_bins: int = 2048, stride: int = 16) -> None:
        self.histogram, self.stride = Histogram(channels, num_bins), stride

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    def scale(self, format: Format) -> Tensor:
        return self.histogram.scale(self._threshold, format)

    def _threshold(self, format: Format) -> Tensor:
        counts, width = self.histogram.counts.double(), self.histogram.width
        centres = self.histogram.centres
        # fewer bins than levels would be a perfect fit that says nothing
        first = min(int(format.highest) + 1, 128)
        last = int((self.histogram.extremes.absmax.reshape(-1) / width).amax()) + 1  # bins up to the largest number
        return least(
            (width * bins, _divergence(counts, centres, width * bins, bins, format))
            for bins in range(max(last, first), first - 1, -self.stride)
        )


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "absmax": AbsMax,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}


def scale_of(absmax: Tensor, format: Format) -> Tensor:
    """The scale that covers +-absmax, in the shape of absmax; 1 where that is 0."""
    if not format.symmetric:
        raise QuantisationError("an observer gives scales without zero points: the format must be symmetric")
    return (absmax / format.reach).clamp(min=SMALLEST_SCALE).where(absmax > 0, torch.ones_like(absmax))


def least(candidates: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Of pairs (value [C], error [C]), the value of least error in each place; the first of equals."""
    best, least_error = next(candidates)
    for value, error in candidates:
        better = error < least_error
        best, least_error = value.where(better, best), error.where(better, least_error)
    return best


def _rounded(x: Tensor, threshold: Tensor, format: Format) -> Tensor:
    """x [C, B] as stored with a range of threshold [C]."""
    scale = scale_of(threshold, format)[:, None]
    return format.round(x / scale) * scale


def _divergence(counts: Tensor, centres: Tensor, threshold: Tensor, bins: int, format: Format) -> Tensor:
    """KL(P || Q) of keeping the first `bins` bins: [C] float64."""
    kept = counts[:, :bins]
    full = kept.clone()
    full[:, -1] += counts[:, bins:].sum(1)  # P
    stored = format.store(format.round(centres[:, :bins] / scale_of(threshold, format)[:, None]))
    level = stored.view(torch.int8).to(torch.int64)  # stored numbers are not negative, so their bytes are levels
    zeros = torch.zeros(len(counts), 128, dtype=torch.float64, device=counts.device)
    mass = zeros.scatter_add(1, level, kept)
    share = zeros.scatter_add(1, level, (full > 0).double())  # bins that are not empty
    spread = (mass / share.clamp(min=1)).gather(1, level)
    # a last bin that holds nothing but what saturates has nothing in Q: half a count, or KL would be infinite
    spread = spread.clamp(min=0.5).where(full > 0, 0)  # Q
    p, q = full / full.sum(1, keepdim=True), spread / spread.sum(1, keepdim=True)
    return torch.special.xlogy(p, p / q.where(full > 0, 1)).sum(1)
