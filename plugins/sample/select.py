"""Which tokens of a row may be drawn, without a sort: top_k and top_p as thresholds found by radix select.

A logit is an unsigned integer of the same order, read eight bits at a time from the top. A launch counts, over all
tokens whose higher bits are those of the threshold, how many (top_k) or how much mass (top_p) each value of the next
eight bits has; the next launch descends into the value where the threshold lies. Mass is a 30-bit fixed-point number
of the best token's, and all sums are of integers: the result is exact and the same in any order, batch and launch.
"""

import triton
import triton.language as tl

from .values import adjusted_logits, image

# a level's histograms: how many, and the mass in pieces of ten bits, lowest first; fp16 holds each of them exactly
BINS = tl.constexpr(256)
TABLE = tl.constexpr(1024)
STATE = tl.constexpr(4)  # of a level: prefix, need (low, high 24 bits), and the bits that top_k requires


@triton.jit
def ordered(z):
    """fp32 -> uint32 in the same order."""
    return image(z).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def peak_kernel(
    logits, sample_rows, sample_positions, penalties, counts, bias_ids, bias_values, stop_ids, min_length,
    peaks, tables,
    V: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, B: tl.constexpr, BIASES: tl.constexpr, S: tl.constexpr,
    EXTRAS: tl.constexpr, CLEAR: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The largest adjusted logit of each span: peaks [R, blocks]. Clears the row's SIZE integers of histograms."""
    block, r = tl.program_id(0), tl.program_id(1)
    row = tl.load(sample_rows + r)
    if row < 0:
        return
    position = tl.load(sample_positions + r)
    i = block * CLEAR + tl.arange(0, CLEAR)
    tl.store(tables + r.to(tl.int64) * SIZE + i, tl.zeros([CLEAR], tl.int32), mask=i < SIZE)
    top = tl.full([N], float("-inf"), tl.float32)
    for start in range(block * SPAN, tl.minimum(block * SPAN + SPAN, V), N):
        z = adjusted_logits(logits, r, row, position, start, penalties, counts, bias_ids, bias_values, stop_ids,
                            min_length, V, N, B, BIASES, S, EXTRAS)  # fmt: skip
        top = tl.maximum(top, z)
    tl.store(peaks + r * tl.num_programs(0) + block, tl.max(top, 0))


@triton.jit
def row_peak(peaks, r, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """The largest adjusted logit of row r, a finite number."""
    i = tl.arange(0, PADDED)
    return tl.maximum(tl.max(tl.load(peaks + r * BLOCKS + i, mask=i < BLOCKS, other=float("-inf")), 0), -3.4028234e38)


@triton.jit
def read_state(states):
    """-> prefix (uint32), need (int64)."""
    low, high = tl.load(states + 1).to(tl.int64), tl.load(states + 2).to(tl.int64)
    return tl.load(states).to(tl.uint32, bitcast=True), low + (high << 24)


@triton.jit
def descend(table, prefix, need, share, MASS: tl.constexpr):
    """From a level's histogram: (prefix with the level's eight bits, what is still needed among those of this prefix).

    need: how many tokens, or how much mass, the threshold must take in of those of this prefix; 0 is the first level of
    mass, where the whole is known only now: `share` of it.
    """
    value = tl.arange(0, BINS)
    if MASS:
        h = tl.load(table + BINS + value).to(tl.int64)
        h += tl.load(table + 2 * BINS + value).to(tl.int64) << 10
        h += tl.load(table + 3 * BINS + value).to(tl.int64) << 20
        whole = tl.sum(h, 0)
        if need == 0:
            need = tl.maximum(tl.ceil(share.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
    else:
        h = tl.load(table + value).to(tl.int64)
        whole = tl.sum(h, 0)
    from_here = whole - tl.cumsum(h, 0) + h  # of this value and those above it
    digit = tl.maximum(tl.sum((from_here >= need).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(value > digit, h, 0), 0)
    return prefix * 256 + digit.to(tl.uint32), need - above


@triton.jit
def count_pieces(w, digit, N: tl.constexpr):
    """Sums of w [N] (integers up to 1024) by digit's high and low bits -> [4, 16, 16] int32, as products of matrices.

    Each of four warps has its own tokens and sums, added up only at the end.
    """
    bins = tl.arange(0, 16)
    w = tl.reshape(w, [4, N // 4])
    high, low = tl.reshape(digit >> 4, [4, N // 4]), tl.reshape(digit & 15, [4, N // 4])
    a = (high[:, None, :] == bins[None, :, None]).to(tl.float16)
    b = tl.where(low[:, :, None] == bins[None, None, :], w[:, :, None], 0).to(tl.float16)
    return tl.dot(a, b, out_dtype=tl.float32).to(tl.int32)


@triton.jit
def add_to(table, sums):
    i = tl.arange(0, 16)
    sums = tl.sum(sums, 0)
    tl.atomic_add(table + i[:, None] * 16 + i[None, :], sums, mask=sums != 0, sem="relaxed")


@triton.jit
def select_kernel(
    logits, sample_rows, sample_positions, temperatures, top_k, top_p, min_p,
    penalties, counts, bias_ids, bias_values, stop_ids, min_length, peaks, tables, states, level,
    V: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, B: tl.constexpr, BIASES: tl.constexpr, S: tl.constexpr,
    EXTRAS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """One level of top_k (MASS=False) or, after all of those, of top_p.

    tables [R, LEVELS, 4, BINS]; states [R, 2, LEVELS, STATE] int32: what a level starts from, written for the next.
    """
    block, r = tl.program_id(0), tl.program_id(1)
    row = tl.load(sample_rows + r)
    if row < 0:
        return
    temperature = tl.load(temperatures + row)
    k, share = tl.load(top_k + row), tl.load(top_p + row)
    truncated_k = (k > 0) & (k < V)
    if temperature <= 0:
        return
    if MASS:
        if share >= 1.0:
            return
    else:
        if not truncated_k:
            return
    position = tl.load(sample_positions + r)
    tables += r.to(tl.int64) * (LEVELS * TABLE)
    states += r * (2 * LEVELS * STATE)
    mine = states + (MASS * LEVELS + level) * STATE
    # where the threshold lies so far
    prefix = tl.zeros([], tl.uint32)
    need = tl.zeros([], tl.int64)
    floor = tl.zeros([], tl.uint32)
    if level > 0:
        prefix, need = read_state(mine - STATE)
        prefix, need = descend(tables + (level - 1) * TABLE, prefix, need, share, MASS)
        if MASS:
            floor = tl.load(mine - STATE + 3).to(tl.uint32, bitcast=True)
    else:
        if MASS:
            if truncated_k:
                before, left = read_state(states + (LEVELS - 1) * STATE)
                floor, left = descend(tables + (LEVELS - 1) * TABLE, before, left, share, False)
        else:
            need += k
    if block == 0:
        tl.store(mine, prefix.to(tl.int32, bitcast=True))
        tl.store(mine + 1, (need & 0xFFFFFF).to(tl.int32))
        tl.store(mine + 2, (need >> 24).to(tl.int32))
        tl.store(mine + 3, floor.to(tl.int32, bitcast=True))
    shift = 24 - 8 * level
    peak = row_peak(peaks, r, BLOCKS, PADDED)
    least = tl.log(tl.load(min_p + row))
    low = tl.zeros([4, 16, 16], tl.int32)
    middle = tl.zeros([4, 16, 16], tl.int32)
    high = tl.zeros([4, 16, 16], tl.int32)
    for start in range(block * SPAN, tl.minimum(block * SPAN + SPAN, V), N):
        z = adjusted_logits(logits, r, row, position, start, penalties, counts, bias_ids, bias_values, stop_ids,
                            min_length, V, N, B, BIASES, S, EXTRAS)  # fmt: skip
        u = ordered(z)
        rest = u >> shift.to(tl.uint32)
        counted = (start + tl.arange(0, N) < V) & ((rest >> 8) == prefix)
        digit = (rest & 255).to(tl.int32)
        if MASS:
            x = (z - peak) / temperature
            counted = counted & ((u >> (32 - 8 * LEVELS)) >= floor) & (x >= least)
            mass = tl.where(counted, (tl.exp(x) * 1073741824.0 + 0.5).to(tl.int32), 0)
            if tl.max(mass, 0) > 0:
                low += count_pieces(mass & 1023, digit, N)
                middle += count_pieces((mass >> 10) & 1023, digit, N)
                high += count_pieces(mass >> 20, digit, N)
        else:
            some = counted.to(tl.int32)
            if tl.max(some, 0) > 0:
                low += count_pieces(some, digit, N)
    tables += level * TABLE
    if MASS:
        add_to(tables + BINS, low)
        add_to(tables + 2 * BINS, middle)
        add_to(tables + 3 * BINS, high)
    else:
        add_to(tables, low)


@triton.jit
def threshold(tables, states, r, k, share, V: tl.constexpr, LEVELS: tl.constexpr):
    """The leading 8 * LEVELS bits that a token of row r needs (0: all are kept), once every level has been counted."""
    tables += r.to(tl.int64) * (LEVELS * TABLE) + (LEVELS - 1) * TABLE
    states += r * (2 * LEVELS * STATE) + (LEVELS - 1) * STATE
    least = tl.zeros([], tl.uint32)
    if share < 1.0:
        prefix, need = read_state(states + LEVELS * STATE)
        least, need = descend(tables, prefix, need, share, True)
    else:
        if (k > 0) & (k < V):
            prefix, need = read_state(states)
            least, need = descend(tables, prefix, need, share, False)
    return least
