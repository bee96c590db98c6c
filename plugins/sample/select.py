"""Which tokens of a row may be drawn, without a sort: top_k and top_p as thresholds found by radix select.

A logit is an unsigned integer of the same order, read four bits at a time from the top. A launch counts, over all
tokens whose higher bits are those of the threshold, how many (top_k) or how much mass (top_p) each value of the next
four bits has; the next launch descends into the value where the threshold lies. Mass is a 30-bit fixed-point number
of the best token's, and all sums are of integers: the result is exact and the same in any order, batch and launch.
"""

import triton
import triton.language as tl

from ..pdl import begin
from .values import adjusted_logits, depth_of, image

# a level's histograms: how many, and the mass in pieces of 16 bits, lowest first, so that sums fit an int32
BINS = tl.constexpr(16)
TABLE = tl.constexpr(64)
STATE = tl.constexpr(4)  # of a level: prefix, need (low, high 24 bits), and the bits that top_k requires


@triton.jit
def ordered(z):
    """fp32 -> uint32 in the same order."""
    return image(z).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def peak_kernel(
    logits, sample_rows, sample_positions, penalties, counts, bias_ids, bias_values, stop_ids, min_length, masks,
    step_tokens, logit_rows, ancestors, peaks, tables,
    V: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, B: tl.constexpr, BIASES: tl.constexpr, S: tl.constexpr,
    EXTRAS: tl.constexpr, ROWS: tl.constexpr, DRAFTS: tl.constexpr, CLEAR: tl.constexpr, SIZE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The largest adjusted logit of each span: peaks [R, blocks]. Clears the row's SIZE integers of histograms."""
    begin(PDL)
    block, r = tl.program_id(0), tl.program_id(1)
    row = tl.load(sample_rows + r)
    if row < 0:
        return
    position = tl.load(sample_positions + r)
    depth = depth_of(sample_rows, r, row, DRAFTS)
    i = block * CLEAR + tl.arange(0, CLEAR)
    tl.store(tables + r.to(tl.int64) * SIZE + i, tl.zeros([CLEAR], tl.int32), mask=i < SIZE)
    top = tl.full([N], float("-inf"), tl.float32)
    for start in range(block * SPAN, tl.minimum(block * SPAN + SPAN, V), N):
        z = adjusted_logits(logits, r, row, depth, position, start, penalties, counts, bias_ids, bias_values,
                            stop_ids, min_length, masks, step_tokens, logit_rows, ancestors, V, N, B, BIASES, S,
                            EXTRAS, ROWS, DRAFTS)  # fmt: skip
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
    """From a level's histogram: (prefix with the level's four bits, what is still needed among those of this prefix).

    need: how many tokens, or how much mass, the threshold must take in of those of this prefix; 0 is the first level of
    mass, where the whole is known only now: `share` of it.
    """
    value = tl.arange(0, BINS)
    if MASS:
        h = tl.load(table + BINS + value).to(tl.int64)
        h += tl.load(table + 2 * BINS + value).to(tl.int64) << 16
        h += tl.load(table + 3 * BINS + value).to(tl.int64) << 32
        whole = tl.sum(h, 0)
        if need == 0:
            need = tl.maximum(tl.ceil(share.to(tl.float64) * whole.to(tl.float64)).to(tl.int64), 1)
    else:
        h = tl.load(table + value).to(tl.int64)
        whole = tl.sum(h, 0)
    from_here = whole - tl.cumsum(h, 0) + h  # of this value and those above it
    digit = tl.maximum(tl.sum((from_here >= need).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(value > digit, h, 0), 0)
    return prefix * 16 + digit.to(tl.uint32), need - above


@triton.jit
def select_kernel(
    logits, sample_rows, sample_positions, temperatures, top_k, top_p, min_p,
    penalties, counts, bias_ids, bias_values, stop_ids, min_length, masks, step_tokens, logit_rows, ancestors, peaks,
    tables, states, level,
    V: tl.constexpr, SPAN: tl.constexpr, N: tl.constexpr, B: tl.constexpr, BIASES: tl.constexpr, S: tl.constexpr,
    EXTRAS: tl.constexpr, ROWS: tl.constexpr, DRAFTS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
    LEVELS: tl.constexpr, MASS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One level of top_k (MASS=False) or, after all of those, of top_p.

    tables [R, LEVELS, 4, BINS]; states [R, 2, LEVELS, STATE] int32: what a level starts from, written for the next.
    """
    begin(PDL)
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
    depth = depth_of(sample_rows, r, row, DRAFTS)
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
    shift = 28 - 4 * level
    peak = row_peak(peaks, r, BLOCKS, PADDED)
    least = tl.log(tl.load(min_p + row))
    value = tl.arange(0, BINS)
    low = tl.zeros([BINS, N], tl.int32)
    high = tl.zeros([BINS, N], tl.int32)
    for start in range(block * SPAN, tl.minimum(block * SPAN + SPAN, V), N):
        z = adjusted_logits(logits, r, row, depth, position, start, penalties, counts, bias_ids, bias_values,
                            stop_ids, min_length, masks, step_tokens, logit_rows, ancestors, V, N, B, BIASES, S,
                            EXTRAS, ROWS, DRAFTS)  # fmt: skip
        u = ordered(z)
        rest = u >> shift.to(tl.uint32)
        counted = (start + tl.arange(0, N) < V) & ((rest >> 4) == prefix)
        digit = (rest & 15).to(tl.int32)
        if MASS:
            x = (z - peak) / temperature
            counted = counted & ((u >> (32 - 4 * LEVELS)) >= floor) & (x >= least)
            mass = tl.where(counted, (tl.exp(x) * 1073741824.0 + 0.5).to(tl.int32), 0)  # of 2^30
            here = digit[None, :] == value[:, None]
            low += tl.where(here, (mass & 32767)[None, :], 0)
            high += tl.where(here, (mass >> 15)[None, :], 0)
        else:
            low += (tl.where(counted, digit, BINS)[None, :] == value[:, None]).to(tl.int32)
    tables += level * TABLE + value
    if MASS:
        mass = tl.sum(low, 1).to(tl.int64) + (tl.sum(high, 1).to(tl.int64) << 15)
        for piece in tl.static_range(3):
            part = ((mass >> (16 * piece)) & 65535).to(tl.int32)
            tl.atomic_add(tables + (piece + 1) * BINS, part, mask=part != 0, sem="relaxed")
    else:
        many = tl.sum(low, 1)
        tl.atomic_add(tables, many, mask=many != 0, sem="relaxed")


@triton.jit
def threshold(tables, states, r, k, share, V: tl.constexpr, LEVELS: tl.constexpr):
    """The leading 4 * LEVELS bits that a token of row r needs (0: all are kept), once every level has been counted."""
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
