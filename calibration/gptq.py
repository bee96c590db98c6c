"""GPTQ: rounds a weight column by column, and lets the columns not yet rounded make up for each error.

E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. What is minimised is ||X (W - Q)^T||, of which H = 2 X^T X is all one needs to know: K x K numbers
however long the calibration text is.
"""

import torch
from torch import Tensor

from . import QuantisationError
from .formats import Format, Quantised, check_finite, ranges


class Hessian:
    """H = 2 X^T X of the inputs X of a layer, added up over batches: constant memory, 4 K^2 bytes in float32."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.num_samples = dtype, 0
        self._matrix: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Adds a batch [T, K] of any float dtype. A QuantisationError if it has a NaN or an infinity."""
        check_finite(x, "an activation")
        x = x.to(self.dtype)
        if self._matrix is None:
            self._matrix = torch.zeros(x.shape[1], x.shape[1], dtype=self.dtype, device=x.device)
        self._matrix.addmm_(x.T, x, alpha=2)
        self.num_samples += len(x)

    @property
    def matrix(self) -> Tensor:
        """H [K, K]. A QuantisationError if nothing was seen."""
        if self._matrix is None or not self.num_samples:
            raise QuantisationError("GPTQ needs inputs of the layer: no batch was seen")
        return self._matrix

    def inverse_root(self, damp: float, order: Tensor) -> Tensor:
        """The upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1, columns in `order`: [K, K].

        Row i of U is what rounding column i does to the columns after it. H of fewer tokens than columns is singular
        without the damping; where it still is in floating point, damping is raised tenfold, up to the mean itself.
        """
        mean = self.matrix.diagonal().mean()
        # a column that was never active has nothing to make up for: any positive number leaves it alone
        mean = mean.where(mean > 0, torch.ones_like(mean))
        while damp <= 1:
            # K x K numbers are 0.8 GB for the widest layer of an 8B model: no more than three of them at a time
            matrix = self.matrix[order][:, order]
            matrix.diagonal().add_(mean * damp)
            matrix, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                matrix = torch.cholesky_inverse(matrix)
                matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
                if not failed and matrix.isfinite().all():
                    return matrix
            damp *= 10
        raise QuantisationError(
            f"GPTQ cannot invert the Hessian of {len(self.matrix)} columns and {self.num_samples} tokens,"
            " whatever its damping: use more calibration text, or another method for this layer"
        )


def gptq(
    weight: Tensor,
    hessian: Hessian,
    format: Format,
    act_order: bool = False,
    damp: float = 0.01,
    block: int = 128,
    clip: float | Tensor = 1.0,
) -> tuple[Quantised, Tensor | None]:
    """Weight [N, K] in the format, with less error in what the layer puts out than rounding to nearest has.

    Scales are those of the weight as it is, found before any column moves ("static groups"). So columns may be rounded
    in any order and yet keep their place and their group, and an engine needs no permutation. Scales found when a
    group's turn comes are no better: on a 14M Llama's layers, int4 in groups of 128, errors differed by 0.5% at most,
    either way.
    act_order rounds the columns of the largest inputs first, while most others can still make up for them. The second
    value is the order [K] int64 in which columns were rounded, for those who want to see it; None without act_order.
    damp: added to the diagonal, in units of its mean. block: columns after which the rest of the weight is brought up
    to date; changes speed, not numbers. clip: as in `round_to_nearest`; `awq.search_clip` finds one that takes another
    1 to 8% off the error on those layers (`benchmarks/quantisers.py`).
    Raises QuantisationError: NaN or infinite weights, a group that does not divide K, a Hessian with no inverse.
    """
    check_finite(weight, "a weight")
    num_columns = weight.shape[1]
    if hessian.matrix.shape[0] != num_columns:
        raise QuantisationError(f"a Hessian of {len(hessian.matrix)} columns is not of a weight of {num_columns}")
    scale, zero = ranges(weight, format, clip)  # [n, k]
    group = format.group or num_columns
    order = torch.arange(num_columns, device=weight.device)
    if act_order:
        order = hessian.matrix.diagonal().argsort(descending=True, stable=True)
    upper = hessian.inverse_root(damp, order)  # [K, K]
    # columns lie in rows from here on, so that each is contiguous
    rest = weight.to(hessian.dtype).T[order]  # [K, N]: what each column should be, given those rounded before it
    values = torch.empty_like(rest)
    columns = order.tolist()
    for start in range(0, num_columns, block):
        end = min(start + block, num_columns)
        now, root = rest[start:end].clone(), upper[start:end, start:end]
        errors = torch.empty_like(now)
        for i in range(end - start):
            g = columns[start + i] // group
            step = _of_rows(scale[:, g], format, now[i])
            shift = 0 if zero is None else _of_rows(zero[:, g], format, now[i])
            x = now[i] / step
            stored = format.round(x.round() + shift if format.integer else x)
            values[start + i] = stored
            errors[i] = (now[i] - (stored - shift) * step) / root[i, i]
            now[i + 1 :].addr_(root[i, i + 1 :], errors[i], alpha=-1)
        rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    values = format.store(values[order.argsort()].T).contiguous()  # back in their places: [N, K]
    return Quantised(format, values, scale, zero), order if act_order else None


def _of_rows(numbers: Tensor, format: Format, column: Tensor) -> Tensor:
    """Numbers [n] of blocks of rows as one for each row of a column [N], in its dtype."""
    return numbers.to(column.dtype).repeat_interleave(format.rows or len(column))[: len(column)]
