"""AWQ: makes the columns of a weight that meet large inputs larger before rounding, and clips the rest.

J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978.
As in SmoothQuant X W^T = (X / s) (W * s)^T, and the layer before takes 1 / s; but only the weight is rounded, and s is
found by trying. Both searches include the weight as it is, so neither makes the error it measures larger.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import Format, check_finite, round_to_nearest

TOKENS_AT_ONCE = 4096


def search_scales(
    weights: Sequence[Tensor], inputs: Tensor, mean_abs: Tensor, format: Format, num_grid: int = 20
) -> Tensor:
    """s [K] float32, to multiply the columns of W by and divide x by: mean_abs^a, its largest times its least made 1.

    a is the one of 0, 1/num_grid .. 1 with the least error ||X (W - Q(W s) / s)^T||^2, summed over the weights [N_i, K]
    that read this input; a = 0 is no scaling. inputs [T, K]: a sample of it; mean_abs [K]: the mean magnitude of its
    channels over all calibration text.
    Raises QuantisationError: NaN or infinite inputs or weights, a group that does not divide K.
    """
    check_finite(inputs, "an activation")
    mean_abs = mean_abs.float()
    mean_abs = mean_abs.clamp(min=1e-4 * float(mean_abs.amax()) or 1.0)  # channels without input: of no account
    if len(inputs) > inputs.shape[1]:  # ||X delta||^2 = ||R delta||^2 with the triangle R of X = Q R: fewer rows
        inputs = torch.linalg.qr(inputs.float(), mode="r").R
    best, least = torch.ones_like(mean_abs), float("inf")
    for step in range(num_grid + 1):
        s = mean_abs ** (step / num_grid)
        s = s / (s.amax() * s.amin()).sqrt()
        error = 0.0
        for weight in weights:
            weight = weight.float()
            error += output_error(weight - round_to_nearest(weight * s, format).dequantise() / s, inputs)
        if error < least:
            best, least = s, error
    return best


def search_clip(weight: Tensor, inputs: Tensor, format: Format, num_grid: int = 20, most: float = 0.5) -> Tensor:
    """The `clip` of `round_to_nearest` for each block of weight [N, K]: [ceil(N / rows), ceil(K / group)] float32.

    Each block takes the ratio of 1, 1 - 1/num_grid .. 1 - most with which its own part of the output, the group's
    columns of inputs [T, K] times its error, is nearest to what it should be. Errors of other groups of the same row
    are taken to be independent, as in the paper. For weights that were scaled hand over inputs / s.
    Raises QuantisationError: NaN or infinite inputs or weights, a group that does not divide K.
    """
    check_finite(inputs, "an activation")
    weight = weight.float()
    gram = _gram(inputs, format)  # [k, group, group]
    n, k = format.scale_shape(*weight.shape)
    best = torch.ones(n, k, device=weight.device)
    least = torch.full_like(best, float("inf"))
    for step in range(int(num_grid * most) + 1):
        ratio = 1 - step / num_grid
        delta = format.blocks(weight - round_to_nearest(weight, format, clip=ratio).dequantise())  # [n, rows, k, group]
        delta = delta.flatten(0, 1).transpose(0, 1)  # [k, n * rows, group]
        error = ((delta @ gram) * delta).sum(2)  # [k, n * rows]: delta G delta^T is ||X delta||^2
        error = error.unflatten(1, (n, -1)).sum(2).T  # [n, k]
        better = error < least
        best, least = best.masked_fill(better, ratio), error.where(better, least)
    return best


def output_error(delta: Tensor, inputs: Tensor) -> float:
    """||X delta^T||^2 of an error delta [N, K] of a weight and inputs [T, K]."""
    return sum(float((x.float() @ delta.T).square().sum()) for x in inputs.split(TOKENS_AT_ONCE))


def _gram(inputs: Tensor, format: Format) -> Tensor:
    """X^T X of each group of columns: [k, group, group]."""
    grams = []
    for x in inputs.split(TOKENS_AT_ONCE):
        columns = Format(format.dtype, format.group).blocks(x.float())[:, 0].transpose(0, 1)  # [k, T, group]
        grams.append(columns.transpose(1, 2) @ columns)
    return torch.stack(grams).sum(0)
