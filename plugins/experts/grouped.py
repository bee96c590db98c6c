"""The two matrix products of a mixture of experts, each over blocks of rows of one expert, and the sum over choices.

A block that `sort_kernel` gave no rows exits at once, so the weights of an expert nobody chose are never read. As in
Linear the weight is the first operand of the tensor cores and the rows are the second: 16 of them fill an instruction.
"""

import triton
import triton.language as tl

from ..gated_activation.activate import activate
from ..pdl import begin


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        active = gate / (1.0 + tl.exp(-ALPHA * gate))
    else:
        active = activate(gate, ACTIVATION)
    return active * up


@triton.jit
def grouped_kernel(
    x, weight, bias, order, owner, y, blocks,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    CHOICES: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y[p] = x[p // CHOICES] weight[e]^T + bias[e] for the pairs p of each block's expert e; weight[e] is [N, K], or
    [K, N] if TRANSPOSED. With an ACTIVATION, rows of the weight are gates and ups, and y has act(gate) * up, N / 2.

    EVEN: tiles divide the weight, so that only rows of x need masks.
    """
    begin(PDL)
    GATED: tl.constexpr = ACTIVATION != ""
    WIDTH: tl.constexpr = N // 2 if GATED else N  # columns of y
    BW: tl.constexpr = BN // 2 if GATED else BN
    TILES: tl.constexpr = (WIDTH + BW - 1) // BW
    # programs of GROUP neighbouring tiles take all blocks in turn: what blocks of an expert share stays in the L2 cache
    program = tl.program_id(0)
    left = program // (GROUP * blocks) * GROUP
    size = tl.minimum(TILES - left, GROUP)
    column = (left + program % (GROUP * blocks) % size) * BW
    block = program % (GROUP * blocks) // size
    expert = tl.load(owner + block)
    if expert < 0:
        return
    pair = tl.load(order + block * BM + tl.arange(0, BM))
    there = pair >= 0
    j = tl.arange(0, BN)
    if GATED and not INTERLEAVED:
        n = j // BW * WIDTH + column + j % BW  # gates, then as many ups
        inside = column + j % BW < WIDTH
    else:
        n = (2 * column if GATED else column) + j
        inside = n < N
    k = tl.arange(0, BK)
    from_weight = weight + expert.to(tl.int64) * N * K
    w_at = from_weight + (k[None, :] * N + n[:, None] if TRANSPOSED else n[:, None] * K + k[None, :])
    x_at = x + (pair // CHOICES)[None, :].to(tl.int64) * K + k[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        step = start * N if TRANSPOSED else start
        if EVEN:
            w = tl.load(w_at + step)
            t = tl.load(x_at + start, mask=there[None, :], other=0.0)
        else:
            deep = k < K - start
            w = tl.load(w_at + step, mask=inside[:, None] & deep[None, :], other=0.0)
            t = tl.load(x_at + start, mask=there[None, :] & deep[:, None], other=0.0)
        acc = tl.dot(w, t, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + expert.to(tl.int64) * N + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if INTERLEAVED:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [BW, 2, BM]), [0, 2, 1]))
        else:
            gate, up = tl.split(tl.permute(tl.reshape(acc, [2, BW, BM]), [1, 2, 0]))
        out = gated(gate, up, ACTIVATION, ALPHA, LIMIT)
    else:
        out = acc
    i = column + tl.arange(0, BW)
    y_at = y + pair[:, None].to(tl.int64) * WIDTH + i[None, :]
    tl.store(y_at, tl.trans(out).to(y.dtype.element_ty), mask=there[:, None] & (i[None, :] < WIDTH))


@triton.jit
def weighted_sum_kernel(
    parts, index, route, y, E: tl.constexpr, CHOICES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """y[t] = sum over j of route[t, j] * parts[t * CHOICES + j], in order; a choice that is no expert has no part."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(CHOICES):
        pair = token * CHOICES + j
        expert = tl.load(index + pair)
        known = (expert >= 0) & (expert < E)
        part = tl.load(parts + pair * WIDTH + i, mask=known & (i < WIDTH), other=0.0)
        total += tl.where(known, tl.load(route + pair).to(tl.float32) * part, 0.0)
    tl.store(y + token * WIDTH + i, total.to(y.dtype.element_ty), mask=i < WIDTH)
