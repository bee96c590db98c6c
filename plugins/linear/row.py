"""Up to eight rows by a weight without tensor cores: the weight is streamed once, with wide loads.

A program takes BN rows of the weight and a slice of depth at a time: each thread multiplies eight neighbouring numbers
of the weight with those of every row of x and adds them up at once, so that a row of x costs one register a row of the
weight. The next slice is loaded while one is multiplied; the first before the kernels ahead are done, since no kernel
writes weights.
"""

import triton
import triton.language as tl

from ..gated_activation.activate import gate
from ..pdl import launch_next, wait

MOST_ROWS = 8


@triton.jit
def linear_row_kernel(
    x, weight, bias, y,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y [M, N] = x weight^T + bias; with an ACTIVATION, rows of the weight are gates, then ups, and y is [M, N / 2].

    EVEN: blocks divide N and K.
    """
    launch_next(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    j = tl.arange(0, BN)
    column = tl.program_id(0) * BW + j % BW
    n = j // BW * WIDTH + column
    inside = EVEN or column < WIDTH
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)[None, None, :]
    w_at = weight + n[None, :, None].to(tl.int64) * K + k
    x_at = x + m[:, None, None] * K + k
    there = m[:, None, None] < M
    if EVEN:
        w = tl.load(w_at, cache_modifier=".cg")
    else:
        w = tl.load(w_at, mask=inside[None, :, None] & (k < K), other=0.0, cache_modifier=".cg")
    wait(PDL)
    acc = tl.zeros([BM, BN, BK // 8], tl.float32)
    for start in range(0, K, BK):
        if EVEN:
            ahead = tl.load(w_at + (start + BK), mask=start + BK < K, other=0.0, cache_modifier=".cg")
            t = tl.load(x_at + start, mask=there, other=0.0)
        else:
            deep = k < K - start
            ahead = tl.load(w_at + (start + BK), mask=inside[None, :, None] & (k < K - start - BK), other=0.0)
            t = tl.load(x_at + start, mask=there & deep, other=0.0)
        product = w.to(tl.float32) * t.to(tl.float32)
        acc += tl.sum(tl.reshape(product, [BM, BN, BK // 8, 8]), 3)
        w = ahead
    total = tl.sum(acc, 2)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    out = total.to(y.dtype.element_ty)
    if GATED:
        rounded = tl.permute(tl.reshape(out.to(tl.float32), [BM, 2, BW]), [0, 2, 1])
        gates, ups = tl.split(rounded)
        out = gate(gates, ups, ACTIVATION, y.dtype.element_ty)
    i = tl.program_id(0) * BW + tl.arange(0, BW)
    tl.store(y + m[:, None] * WIDTH + i[None, :], out, mask=(m[:, None] < M) & (i[None, :] < WIDTH))
