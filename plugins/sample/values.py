"""What the sampling kernels share: adjusted logits of a block of tokens, their order as integers, the noise.

Every pass over the logits computes the same adjusted logit, to the last bit: thresholds are found in one launch and
used in another. Hence the explicit `tl.fma`: which products a compiler contracts depends on the code around them.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))  # below the `pack` of any token
MANY = tl.constexpr(2**31 - 1)
IN_PROMPT = tl.constexpr(2**30)


@triton.jit
def raw_logits(logits, r, t, V: tl.constexpr):
    """Logits of row r at tokens t [N] -> fp32, never NaN (-inf instead) nor above the largest float."""
    z = tl.load(logits + r.to(tl.int64) * V + t, mask=t < V, other=float("-inf")).to(tl.float32)
    z = tl.where(z == z, z, float("-inf"))
    return tl.minimum(z, 3.4028234e38)


@triton.jit
def depth_of(sample_rows, r, row, DRAFTS: tl.constexpr):
    """Samples of the same request in front of sample r: as many of its drafts are taken to be right."""
    depth = row * 0
    if DRAFTS > 0:
        back = 1 + tl.arange(0, DRAFTS)
        depth = tl.sum((tl.load(sample_rows + r - back, mask=r >= back, other=-1) == row).to(tl.int32), 0)
    return depth


@triton.jit
def own_bit(seen, DRAFTS: tl.constexpr):
    """Of what a token sees of the last keys: the number of the highest bit, its own; 31 where it sees all."""
    own = seen * 0 + 31
    for _i in range(DRAFTS):
        own -= 1 - ((seen >> own) & 1)
    return own


@triton.jit
def adjusted_logits(
    logits, r, row, depth, position, start, penalties, counts, bias_ids, bias_values, stop_ids, min_length, masks,
    step_tokens, logit_rows, ancestors,
    V: tl.constexpr, N: tl.constexpr, B: tl.constexpr, BIASES: tl.constexpr, S: tl.constexpr, EXTRAS: tl.constexpr,
    ROWS: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """Logits [N] fp32 from token `start` on, after masks, bias, min_tokens and penalties; -inf past the vocabulary.

    BIASES: B slots of bias, rounded up to a power of two. Only slots with a token of this block cost a step.
    depth: see `depth_of`; the drafts before a sample count as put out, and each depth has its own ROWS masks. Of a tree
    those before it are its `ancestors`; without one that is None.
    """
    t = start + tl.arange(0, N)
    z = raw_logits(logits, r, t, V)
    if EXTRAS:
        place = row.to(tl.int64)
        mine = place + depth * ROWS
        words = tl.load(masks + mine * ((V + 31) // 32) + t // 32, mask=t < V, other=0)
        z = tl.where((words >> (t % 32)) & 1 != 0, z, float("-inf"))
        if B > 0:
            slot = tl.arange(0, BIASES)
            ids = tl.load(bias_ids + place * B + slot, mask=slot < B, other=-1)
            ids = tl.where((ids >= start) & (ids < start + N), ids, MANY)
            token = tl.min(ids, 0)
            while token < MANY:
                value = tl.load(bias_values + place * B + slot, mask=ids == token, other=0.0)
                z += tl.where(t == token, tl.sum(value, 0), 0.0)
                ids = tl.where(ids == token, MANY, ids)
                token = tl.min(ids, 0)
        if S > 0:
            if position < tl.load(min_length + place):
                for i in range(S):
                    z = tl.where(t == tl.load(stop_ids + place * S + i), float("-inf"), z)
        if uses_penalties(penalties, place):
            repetition, presence, frequency = row_penalties(penalties, place)
            count = tl.load(counts + place * V + t, mask=t < V, other=0)
            if DRAFTS > 0:
                if ancestors is None:
                    for back in range(0, depth):
                        count += (t == tl.load(step_tokens + tl.load(logit_rows + r - back))).to(tl.int32)
                else:
                    seen = tl.load(ancestors + tl.load(logit_rows + r))
                    own = own_bit(seen, DRAFTS)
                    for back in range(0, depth):
                        draft = t == tl.load(step_tokens + tl.load(logit_rows + r - back))
                        count += (draft & ((seen >> (own - back)) & 1 != 0)).to(tl.int32)
            times = (count & (IN_PROMPT - 1)).to(tl.float32)
            z = tl.where(count != 0, tl.where(z > 0, z / repetition, z * repetition), z)
            z = tl.fma(-frequency, times, z)
            z = tl.fma(-presence, tl.where(times > 0, 1.0, 0.0), z)
    return z


@triton.jit
def row_penalties(penalties, row):
    """repetition, presence, frequency of a row of the scheduler."""
    return tl.load(penalties + row * 3), tl.load(penalties + row * 3 + 1), tl.load(penalties + row * 3 + 2)


@triton.jit
def uses_penalties(penalties, row):
    repetition, presence, frequency = row_penalties(penalties, row)
    return (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)


@triton.jit
def image(z):
    """fp32 -> int32 in the same order; both zeros are 0."""
    bits = z.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -(2**31), 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_image(bits):
    """int32 -> the fp32 it is the image of."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(bits, t):
    """int64 whose order is that of images, and among equals the lowest token is the largest."""
    return (bits.to(tl.int64) << 32) | (t ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def unpack(packed):
    """-> image, token."""
    return (packed >> 32).to(tl.int32), (packed & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def gumbel(seed, position, start, N: tl.constexpr):
    """Standard Gumbel noise [N] of tokens from `start` (a multiple of 4) on: see reference.py.

    -log(E), E exponential with its full precision near 0, where the largest noise comes from; within [-2.9, 23].
    """
    group = start // 4 + tl.arange(0, N // 4)
    zero = group * 0
    a, b, c, d = tl.philox(seed, group, zero + position, zero, zero, n_rounds=7)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    u = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), 1.0 - 2.0**-24)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1.0 - u)))
