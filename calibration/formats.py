"""What a quantised tensor is, and rounding to nearest.

A `Format` cuts a matrix [N, K] into blocks of `rows` x `group` numbers that share one float32 scale, and one zero point
if they are not symmetric. Every recipe is one of these: int4 in groups of 128 is 1 x 128, int8 per channel is 1 x K,
DeepSeek's FP8 is 128 x 128, a static activation is all rows x all columns.
`Quantised.dequantise` is ONNX's DequantizeLinear, so that what is measured here is what an engine computes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import QuantisationError

BITS = {"int4": 4, "int8": 8}
FP8 = torch.float8_e4m3fn
FP8_HIGHEST = torch.finfo(FP8).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a subnormal scale would be flushed to 0 on some machines


@dataclass(frozen=True)
class Format:
    """How the numbers of a weight [N, K], or of an activation [T, K], are stored."""

    dtype: str  # "int4", "int8" or "fp8_e4m3"
    group: int = 0  # columns that share a scale; 0: the whole row
    rows: int = 1  # rows that share a scale; 0: all rows
    symmetric: bool = True  # no zero point; fp8 never has one

    def __post_init__(self) -> None:
        if self.dtype not in (*BITS, "fp8_e4m3"):
            raise QuantisationError(f"no such number format: {self.dtype} (there are int4, int8 and fp8_e4m3)")
        for name, number in (("group", self.group), ("rows", self.rows)):
            if type(number) is not int or not 0 <= number < 1 << 31:
                raise QuantisationError(f"its {name} must be a whole number from 0 to {(1 << 31) - 1}")
        if type(self.symmetric) is not bool:
            raise QuantisationError("its `symmetric` must be true or false")
        if not self.symmetric and not self.integer:
            raise QuantisationError("fp8_e4m3 has no zero points: the format must be symmetric")

    @property
    def integer(self) -> bool:
        return self.dtype in BITS

    @property
    def lowest(self) -> float:
        """The smallest stored number: -8, -128 or -448."""
        return -(2.0 ** (BITS[self.dtype] - 1)) if self.integer else -FP8_HIGHEST

    @property
    def highest(self) -> float:
        """The largest stored number: 7, 127 or 448."""
        return -self.lowest - 1 if self.integer else FP8_HIGHEST

    @property
    def reach(self) -> float:
        """Scales that cover +-m are m / reach: 7.5, 127.5 or 448.

        Half the span of the integers, not `highest`: m itself then rounds to 7 instead of 7.5, still within half a
        scale, and every scale is 7/7.5 of what it would be, which takes 13% off the mean square error of int4.
        """
        return (self.highest - self.lowest) / 2

    def scale_shape(self, num_rows: int, num_columns: int) -> tuple[int, int]:
        """[ceil(N / rows), ceil(K / group)]; a QuantisationError if integers do not fill the last group.

        FP8 blocks may be cut off at the edges; kernels for integers read whole groups.
        """
        if self.integer and self.group and num_columns % self.group:
            raise QuantisationError(
                f"a group size of {self.group} does not divide the {num_columns} columns of a weight"
            )
        rows, group = self.rows or max(num_rows, 1), self.group or max(num_columns, 1)
        return -(-num_rows // rows), -(-num_columns // group)

    def blocks(self, x: Tensor) -> Tensor:
        """[N, K] -> [n, rows, k, group], zeros in the cut-off blocks at the edges; a view where none is cut off."""
        n, k = self.scale_shape(*x.shape)
        rows, group = (min(size or x.shape[i], x.shape[i]) for i, size in enumerate((self.rows, self.group)))
        x = torch.nn.functional.pad(x, (0, k * group - x.shape[1], 0, n * rows - x.shape[0]))
        return x.reshape(n, rows, k, group)

    def flat(self, blocks: Tensor, num_rows: int, num_columns: int) -> Tensor:
        """The inverse of `blocks`: [n, rows, k, group] -> [N, K]."""
        n, rows, k, group = blocks.shape
        return blocks.reshape(n * rows, k * group)[:num_rows, :num_columns]

    def round(self, x: Tensor) -> Tensor:
        """The nearest stored number of each number of x (ties to even), saturating, in the dtype of x."""
        x = x.clamp(self.lowest, self.highest)  # first: torch makes NaN of what is beyond 448
        return x.round() if self.integer else x.to(FP8).to(x.dtype)

    def store(self, x: Tensor) -> Tensor:
        """Rounded numbers as the dtype that holds them: int8 for int4 and int8, float8_e4m3fn for fp8."""
        return x.to(torch.int8 if self.integer else FP8)


@dataclass(frozen=True)
class Quantised:
    """A matrix in a format."""

    format: Format
    values: Tensor  # [N, K] int8 (int4 and int8) or float8_e4m3fn
    scale: Tensor  # [ceil(N / rows), ceil(K / group)] float32, above 0
    zero: Tensor | None = None  # int8, shape of scale; None: symmetric

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(values - zero) * scale in float32, rounded once to `dtype`: [N, K]."""
        blocks = self.format.blocks(self.values.float())
        if self.zero is not None:
            blocks = blocks - self.zero.float()[:, None, :, None]
        return self.format.flat(blocks * self.scale[:, None, :, None], *self.values.shape).to(dtype)

    def to(self, device: str | torch.device) -> "Quantised":
        """The same on another device."""
        zero = None if self.zero is None else self.zero.to(device)
        return Quantised(self.format, self.values.to(device), self.scale.to(device), zero)


def all_finite(x: Tensor) -> bool:
    """Whether floating-point x has neither NaN nor infinities.

    By its extremes, which a NaN becomes both of: 25 GB/s on a core, where `isfinite().all()` has 0.5 of bfloat16.
    """
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def check_finite(x: Tensor, what: str) -> None:
    """A QuantisationError if x has a NaN or an infinity."""
    if not all_finite(x):
        num_nan = int(x.isnan().sum())
        num_infinite = int(x.isinf().sum())
        raise QuantisationError(f"{what} has {num_nan} NaN and {num_infinite} infinite values of {x.numel()}")


def ranges(weight: Tensor, format: Format, clip: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each block, so that its smallest to its largest number times `clip` is covered.

    A block of zeros gets scale 1. `clip` is one ratio, or one of each block (shape of the scale).
    """
    blocks = format.blocks(weight.float())
    low, high = blocks.amin((1, 3)) * clip, blocks.amax((1, 3)) * clip  # [n, k]
    if format.symmetric:
        reach = torch.maximum(high, -low)
        scale = reach / format.reach
        return scale.clamp(min=SMALLEST_SCALE).where(reach > 0, torch.ones_like(scale)), None
    # 0 must be exact: it is what padding and pruning leave
    low, high = low.clamp(max=0), high.clamp(min=0)
    levels = format.highest - format.lowest
    scale = high / levels - low / levels  # not (high - low) / levels, which may overflow
    scale = scale.clamp(min=SMALLEST_SCALE).where(high > low, torch.ones_like(scale))
    return scale, format.store(format.round(format.lowest - low / scale))


def round_to_nearest(
    weight: Tensor,
    format: Format,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    clip: float | Tensor = 1.0,
) -> Quantised:
    """Each number of weight [N, K] (any float dtype) by its nearest neighbour in the format.

    scale, zero: of each block, or what expands to that (one scale for all); where none is given, the smallest that
    cover the block's numbers times `clip`. Within the range of a block no number moves by more than half its scale.
    Raises QuantisationError: NaN or infinite weights, a group that does not divide K, a scale that is not above 0.
    """
    check_finite(weight, "a weight")
    shape = format.scale_shape(*weight.shape)
    if scale is None:
        scale, zero = ranges(weight, format, clip)
    elif not (scale.isfinite() & (scale > 0)).all():
        raise QuantisationError("the scales of a weight must be finite and above 0")
    elif format.symmetric != (zero is None):
        raise ValueError("an asymmetric format needs zero points with its scales, a symmetric one has none")
    scale = scale.to(torch.float32).expand(shape).contiguous()
    x = format.blocks(weight.float()) / scale[:, None, :, None]
    if zero is not None:
        zero = zero.expand(shape).contiguous()
        x = x.round() + zero.float()[:, None, :, None]  # ONNX's QuantizeLinear rounds before it adds
    values = format.store(format.flat(format.round(x), *weight.shape)).contiguous()
    return Quantised(format, values, scale, zero)
