"""SmoothQuant: moves the outliers of an activation into the weight, which has room for them.

G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438. X W^T = (X / s) (W * s)^T for any s [K]; the norm before the layer takes 1 / s into its weight, so
an engine computes nothing more.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .formats import Format, check_finite, round_to_nearest

INT8 = Format("int8")  # a scale for each row: each token of an activation, each output of a weight


def smoothing(absmax_x: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s [K] float32: absmax_x^alpha / absmax_w^(1 - alpha), the paper's equation 4. Divide x by it, multiply W.

    absmax_x [K]: the largest magnitude of each input channel. weights: all [N_i, K] that read this input.
    alpha 0 makes the columns of the weights equal, 1 the channels of the input. Channels that are always 0, or that
    no weight reads, get 1. The channels that carry anything have s with a geometric mean of 1, which changes no
    rounding and keeps what is stored in fp16 in its range.
    """
    absmax_w = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)  # [K]
    alive = (absmax_x > 0) & (absmax_w > 0)
    if not alive.any():
        return torch.ones_like(absmax_w)
    log_s = alpha * absmax_x.float().log() - (1 - alpha) * absmax_w.log()
    log_s = log_s - log_s[alive].mean()
    return log_s.where(alive, 0).clamp(-11, 11).exp()  # within 6e4, the largest number of fp16


def search_smoothing(
    weights: Sequence[Tensor],
    inputs: Tensor,
    activation: Format = INT8,
    weight: Format = INT8,
    absmax_x: Tensor | None = None,
    share: Callable[[Tensor], Tensor] = lambda s: s,
    num_grid: int = 20,
) -> Tensor:
    """The s [K] of alpha 0, 1/num_grid .. 1, or none (ones), with the least error ||XW^T - Q(X/s) Q(Ws)^T||^2, summed
    over the weights.

    inputs [T, K]: a sample of what the weights [N_i, K] read, quantised to `activation` as it comes (a scale for each
    token by default). absmax_x [K]: of all calibration text, where that is more than the sample. share: makes s one
    that can be used, as where channels of several heads must have the same.
    Raises QuantisationError: NaN or infinite inputs or weights.
    """
    check_finite(inputs, "an activation")
    inputs = inputs.float()
    absmax_x = inputs.abs().amax(0) if absmax_x is None else absmax_x
    targets = [inputs @ w.float().T for w in weights]  # [T, N_i]
    best, least = torch.ones_like(absmax_x, dtype=torch.float32), float("inf")
    for s in (best, *(share(smoothing(absmax_x, weights, step / num_grid)) for step in range(num_grid + 1))):
        x = round_to_nearest(inputs / s, activation).dequantise()
        error = sum(
            float((x @ round_to_nearest(w.float() * s, weight).dequantise().T - target).square().sum())
            for w, target in zip(weights, targets, strict=True)
        )
        if error < least:
            best, least = s, error
    return best
