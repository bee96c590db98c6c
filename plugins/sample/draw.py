"""The draw: the largest of logit + temperature * Gumbel noise among the tokens kept (plain argmax for a greedy row).

Spans of the vocabulary are raced by programs of their own, then a program per row takes the best of its spans.
"""

import triton
import triton.language as tl

from ..pdl import begin
from .select import ordered, row_peak, threshold
from .values import NOTHING, adjusted_logits, depth_of, gumbel, image, own_bit, pack, unpack, uses_penalties


@triton.jit
def race_kernel(
    logits, sample_rows, sample_positions, temperatures, top_k, top_p, min_p, seeds,
    penalties, counts, bias_ids, bias_values, stop_ids, min_length, masks, step_tokens, logit_rows, ancestors, peaks,
    tables, states, best_images, best_tokens,
    V: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, B: tl.constexpr, BIASES: tl.constexpr, S: tl.constexpr,
    EXTRAS: tl.constexpr, ROWS: tl.constexpr, DRAFTS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    LEVELS: tl.constexpr, RANDOM: tl.constexpr, TRUNCATE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The winner of each span: best_images, best_tokens [R, blocks]."""
    begin(PDL)
    block, r = tl.program_id(0), tl.program_id(1)
    row = tl.load(sample_rows + r)
    if row < 0:
        return
    position = tl.load(sample_positions + r)
    depth = depth_of(sample_rows, r, row, DRAFTS)
    if RANDOM:
        temperature = tl.load(temperatures + row)
        seed = tl.load(seeds + row)
    least = tl.zeros([], tl.uint32)
    least_p = tl.full([], float("-inf"), tl.float32)
    peak = tl.zeros([], tl.float32)
    if TRUNCATE:
        if temperature > 0:
            least = threshold(tables, states, r, tl.load(top_k + row), tl.load(top_p + row), V, LEVELS)
            least_p = tl.log(tl.load(min_p + row))
            peak = row_peak(peaks, r, BLOCKS, PADDED)
    best = tl.full([N], NOTHING, tl.int64)
    for start in range(block * SPAN, tl.minimum(block * SPAN + SPAN, V), N):
        t = start + tl.arange(0, N)
        z = adjusted_logits(logits, r, row, depth, position, start, penalties, counts, bias_ids, bias_values,
                            stop_ids, min_length, masks, step_tokens, logit_rows, ancestors, V, N, B, BIASES, S,
                            EXTRAS, ROWS, DRAFTS)  # fmt: skip
        keep = t < V
        if RANDOM:
            if temperature > 0:
                if TRUNCATE:
                    keep = keep & ((ordered(z) >> (32 - 4 * LEVELS)) >= least)
                    keep = keep & ((z - peak) / temperature >= least_p)
                if tl.max(keep.to(tl.int32), 0) > 0:
                    z = tl.fma(tl.zeros([N], tl.float32) + temperature, gumbel(seed, position, start, N), z)
        best = tl.maximum(best, tl.where(keep, pack(image(z), t), NOTHING))
    bits, token = unpack(tl.max(best, 0))
    # a span of which nothing is kept has lost to any other: its token is no token
    tl.store(best_images + r * BLOCKS + block, bits)
    tl.store(best_tokens + r * BLOCKS + block, token)


@triton.jit
def winner(best_images, best_tokens, r, V: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """The token of the best of row r's spans."""
    i = tl.arange(0, PADDED)
    bits = tl.load(best_images + r * BLOCKS + i, mask=i < BLOCKS, other=-(2**31))
    token = tl.load(best_tokens + r * BLOCKS + i, mask=i < BLOCKS, other=0)
    packed = tl.where(i < BLOCKS, pack(bits, token), NOTHING)
    bits, token = unpack(tl.max(packed, 0))
    return tl.minimum(token, V - 1)


@triton.jit
def take_kernel(
    sample_rows, penalties, counts, step_tokens, logit_rows, ancestors, best_images, best_tokens, last_token, tokens,
    V: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, EXTRAS: tl.constexpr, DRAFTS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The best of a row's spans: written to tokens [R] and last_token, and counted where penalties need it.

    DRAFTS: a sample holds if the drafts before it are what was sampled there; only those that hold are counted, and
    the last of them is the row's last token. The draft that a sample had to meet is the token behind the sample's own.
    Where drafts may be trees, and `ancestors` says what is before what, a row that has some keeps its last token.
    """
    begin(PDL)
    r = tl.program_id(0)
    row = tl.load(sample_rows + r)
    if row < 0:
        tl.store(tokens + r, -1)
        return
    token = winner(best_images, best_tokens, r, V, BLOCKS, PADDED)
    tl.store(tokens + r, token)
    holds = row >= 0
    last = holds
    if DRAFTS > 0:
        depth = depth_of(sample_rows, r, row, DRAFTS)
        inside = r + 1 < tl.num_programs(0)
        followed = tl.load(sample_rows + r + 1, mask=inside, other=-1) == row
        if ancestors is None:
            for back in range(1, depth + 1):
                guess = tl.load(step_tokens + tl.load(logit_rows + r - back + 1))
                holds &= winner(best_images, best_tokens, r - back, V, BLOCKS, PADDED) == guess
            next_row = tl.load(logit_rows + r + 1, mask=followed, other=0)
            last = holds & ~(followed & (tl.load(step_tokens + next_row) == token))
        else:
            guess = tl.load(step_tokens + tl.load(logit_rows + r))
            seen = tl.load(ancestors + tl.load(logit_rows + r))
            own = own_bit(seen, DRAFTS)
            for back in range(1, depth + 1):
                if (seen >> (own - back)) & 1 != 0:
                    holds &= winner(best_images, best_tokens, r - back, V, BLOCKS, PADDED) == guess
                    guess = tl.load(step_tokens + tl.load(logit_rows + r - back))
            last = holds & ~followed & (depth == 0)
    tl.store(last_token + row, token, mask=last)
    if EXTRAS:
        place = row.to(tl.int64)
        if uses_penalties(penalties, place):
            tl.atomic_add(counts + place * V + token, 1, mask=holds)  # samples of a row may take the same token
