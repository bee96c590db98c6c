"""Attention of a block of query rows over the keys of one sequence, page by page: the loop that all GPU kernels share.

The rows of a block are all query heads that share a key head (of one token or of several), so K and V are read once for
the group. Softmax runs online in fp32, base 2: scores, maxima and sinks are in units of log2(e). Only keys in
`[first, last)` are loaded, whatever else the pool holds; the others count as zeros with weight zero.

Pages of 8 bits cost their conversion alone: the keys' scale is part of the factor on the scores, and values are summed
as they are stored, to be multiplied in the end. A matrix instruction wants the values of two keys side by side, and no
instruction transposes single bytes: few rows are multiplied with the even and with the odd columns of values, which
come as pairs of 16 bits.

Where drafts are a tree, a row has 32 bits for the last keys of its sequence (`reference.py`).
"""

import triton
import triton.language as tl

from .stored import column, factors, numbers

LOWEST = tl.constexpr(-1.0e30)  # the maximum of no scores: finite, so that no difference of maxima is NaN
WARPGROUP_ROWS = tl.constexpr(64)  # from so many a matrix instruction reads values from shared memory, not registers
LOG2E = tl.constexpr(1.4426950408889634)
TREE = tl.constexpr(32)  # last keys of a sequence that may be nodes of a tree


@triton.jit
def hidden(seen, count):
    """How many of the first `count` of the bits of `seen` are not set: so many positions earlier than its place is what
    lies there. A product counts bits: there is no instruction for it that the interpreter knows."""
    below = (tl.full([1], 1, tl.int64) << tl.minimum(tl.maximum(count, 0), TREE).to(tl.int64)) - 1
    x = (~seen).to(tl.uint32, bitcast=True) & below.to(tl.uint32)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def attend(
    q, acc, top, total, position, page_row, k_pages, v_pages, kv_head, k_unit, first, last, end,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    PAGE: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, seen=None, trunk=0,
):  # fmt: skip
    """Adds keys first, first + 1, .. to the running acc [BM, BDV], top (maximum) [BM] and total [BM] of q [BM, BD].

    k_unit: what stored keys are multiplied by. position: of each row in its sequence. Without MASKED every row must see
    all keys of all blocks of BN up to `last`; with it keys from `end` on do not exist, and rows see what causality and
    the window leave. PAGE 0: keys lie in order instead, that of position 0 in place page_row.

    seen [BM]: bits for the keys from `trunk` on, where there may be a tree; `position` is then a row's place.
    """
    PAIRS: tl.constexpr = v_pages.dtype.element_ty.primitive_bitwidth == 8 and q.shape[0] < WARPGROUP_ROWS
    LAST: tl.constexpr = DV // 2 if PAIRS else DV
    if PAIRS:
        v_pages = v_pages.to(tl.pointer_type(tl.uint16), bitcast=True)
        even, odd = tl.split(tl.reshape(acc, [q.shape[0], BDV // 2, 2]))
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV // 2 if PAIRS else BDV)
    each = tl.arange(0, BN)
    factor = SOFTCAP * LOG2E if SOFTCAP > 0 else k_unit * (SCALE * LOG2E)
    q = factors(q, k_pages)
    # page numbers are a tile ahead: a load whose address is another's result would not be pipelined far
    if PAGE > 0:
        page = tl.load(page_row + (first + each) // PAGE, mask=first + each < last, other=0)
    for start in tl.range(first, last, BN):
        key = start + each
        place = page.to(tl.int64) * PAGE + key % PAGE if PAGE > 0 else key + page_row
        row = place * NUM_KV_HEADS + kv_head
        if MASKED:
            exists = key < end
            k_mask = (d < D)[:, None] & exists[None, :]
            v_mask = exists[:, None] & (dv < LAST)[None, :]
        else:
            k_mask = (d < D)[:, None]
            v_mask = (dv < LAST)[None, :]
        k = tl.load(k_pages + row[None, :] * D + d[:, None], mask=k_mask, other=0.0)  # [BD, BN]
        v = tl.load(v_pages + row[:, None] * LAST + dv[None, :], mask=v_mask, other=0.0)  # [BN, BDV], or its pairs
        if PAGE > 0:
            page = tl.load(page_row + (key + BN) // PAGE, mask=key + BN < last, other=0)
        scores = tl.dot(q, numbers(k, q.dtype), input_precision="ieee")
        if SOFTCAP > 0:  # tanh by one exponential; its error is below 1e-7
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (k_unit * (2.0 * LOG2E * SCALE / SOFTCAP))))
        if MASKED:
            visible = exists[None, :] & (key[None, :] <= position[:, None])
            if seen is not None:
                bit = key - trunk
                at = tl.minimum(tl.maximum(bit, 0), TREE - 1)
                visible &= (bit < 0)[None, :] | ((seen[:, None] >> at[None, :]) & 1 > 0)
                if WINDOW > 0:
                    ours = position - hidden(seen, position - trunk)
                    theirs = key[None, :] - hidden(seen[:, None], bit[None, :])
                    visible &= theirs > ours[:, None] - WINDOW
            elif WINDOW > 0:
                visible &= key[None, :] > position[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        w = weights.to(q.dtype)
        if PAIRS:
            T: tl.constexpr = k_pages.dtype.element_ty
            low, high = column(v, False, T, q.dtype), column(v, True, T, q.dtype)
            even = tl.dot(w, low, even * fade[:, None], input_precision="ieee")
            odd = tl.dot(w, high, odd * fade[:, None], input_precision="ieee")
        else:
            acc = tl.dot(w, numbers(v, q.dtype), acc * fade[:, None], input_precision="ieee")
        top = higher
    if PAIRS:
        acc = tl.reshape(tl.join(even, odd), [q.shape[0], BDV])
    return acc, top, total


@triton.jit
def finish(acc, top, total, v_unit, sinks, head, inside, SINKS: tl.constexpr):
    """The attention [BM, BDV] of accumulated rows; a sink is a score without a value. Rows without a key become 0.

    v_unit: what stored values are multiplied by.
    """
    if SINKS:
        sink = tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        fade = tl.exp2(top - higher)
        return acc * (v_unit * fade / (total * fade + tl.exp2(sink - higher)))[:, None]
    return acc / tl.where(total > 0, total, 1.0)[:, None] * v_unit
