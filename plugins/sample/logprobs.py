"""Log-probabilities of the raw logits: of the token taken, its rank, and the best L tokens.

Spans first (sums, and the best of each by taking the largest L times), then a program per row merges them in order.
"""

import triton
import triton.language as tl

from ..pdl import begin
from .values import NOTHING, from_image, image, pack, raw_logits, unpack


@triton.jit
def score_kernel(
    logits, sample_rows, tokens, tops, totals, above, images, ids,
    V: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Of each span: maximum, sum of exp, tokens above the one taken [R, blocks]; its best as images, ids [.., L]."""
    begin(PDL)
    block, r = tl.program_id(0), tl.program_id(1)
    if tl.load(sample_rows + r) < 0:
        return
    at = r * BLOCKS + block
    first = block * SPAN
    chosen = raw_logits(logits, r, tl.load(tokens + r), V)
    z = raw_logits(logits, r, first + tl.arange(0, N), V)
    top = tl.maximum(tl.max(z, 0), -3.4028234e38)
    tl.store(tops + at, top)
    tl.store(totals + at, tl.sum(tl.exp(z - top), 0))
    tl.store(above + at, tl.sum((z > chosen).to(tl.int32), 0))
    t = first + tl.arange(0, N)
    packed = tl.where(t < V, pack(image(z), t), NOTHING)
    for i in range(L):
        best = tl.max(packed, 0)
        bits, token = unpack(best)
        tl.store(images + at * L + i, bits)
        tl.store(ids + at * L + i, token)
        packed = tl.where(packed == best, NOTHING, packed)


@triton.jit
def logprobs_kernel(
    logits, sample_rows, tokens, tops, totals, above, images, ids, chosen_logprob, chosen_rank, top_ids, top_logprobs,
    V: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, L: tl.constexpr, CANDIDATES: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """CANDIDATES: blocks * L, rounded up to a power of two."""
    begin(PDL)
    r = tl.program_id(0)
    if tl.load(sample_rows + r) < 0:
        return
    i = tl.arange(0, PADDED)
    at = r * BLOCKS + i
    inside = i < BLOCKS
    top = tl.load(tops + at, mask=inside, other=float("-inf"))
    peak = tl.max(top, 0)
    total = tl.sum(tl.load(totals + at, mask=inside, other=0.0) * tl.exp(top - peak), 0)
    whole = peak + tl.log(total)
    chosen = raw_logits(logits, r, tl.load(tokens + r), V)
    tl.store(chosen_logprob + r, chosen - whole)
    tl.store(chosen_rank + r, tl.sum(tl.load(above + at, mask=inside, other=0), 0) + 1)
    c = tl.arange(0, CANDIDATES)
    within = c < BLOCKS * L
    bits = tl.load(images + r * (BLOCKS * L) + c, mask=within, other=0)
    token = tl.load(ids + r * (BLOCKS * L) + c, mask=within, other=0)
    packed = tl.where(within & (token < V), pack(bits, token), NOTHING)
    for j in range(L):
        best = tl.max(packed, 0)
        value, winner = unpack(best)
        tl.store(top_ids + r * L + j, winner)
        tl.store(top_logprobs + r * L + j, from_image(value) - whole)
        packed = tl.where(packed == best, NOTHING, packed)
