"""Attention of prompt chunks on Hopper: `chunk.py`'s tiles, in Gluon, so that products run beside the softmax.

Triton waits for a product of scores right behind it. Here the scores of the next keys are multiplied while the softmax
of these is taken, and keys and values are copied one tile ahead (FlashAttention-3, arXiv:2407.08608, its pipeline
within a warpgroup). Keys go from the last that a tile sees to the first, so that those which need masks come first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..pdl import launch_next, wait

LOWEST = gl.constexpr(-1.0e30)  # as in `attend.py`
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def rows_of(page_row, keys, first, last, kv_head, PAGE: gl.constexpr, NUM_KV_HEADS: gl.constexpr):
    """Rows of the pool that hold these keys, and which of them are in [first, last)."""
    exists = (keys >= first) & (keys < last)
    page = gl.load(page_row + keys // PAGE, mask=exists, other=0)
    return (page.to(gl.int64) * PAGE + keys % PAGE) * NUM_KV_HEADS + kv_head, exists


@gluon.jit
def copy(pages, rows, exists, buffer, D: gl.constexpr, layout: gl.constexpr):
    """Starts to copy rows of the pool into shared memory; zeros for those that do not exist."""
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(buffer, pages + rows[:, None] * D + d[None, :], mask=exists[:, None])


@gluon.jit
def attend_tile(
    i, q, acc, top, total, scores, rows, exists, keys_at, key, position, page_row, k_pages, v_pages, ks, vs, kv_head,
    first, end,
    D: gl.constexpr, PAGE: gl.constexpr, NUM_KV_HEADS: gl.constexpr, BN: gl.constexpr, SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr, COPY: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Tile i: its softmax and its product with the values, beside the scores of tile i + 1.

    rows, exists: of tile i + 1, in layout COPY. keys_at: keys of tile i + 2 there; key: of tile i, as scores lie.
    """
    SCORES: gl.constexpr = scores.type.layout
    FACTOR: gl.constexpr = (SOFTCAP if SOFTCAP > 0 else SCALE) * LOG2E
    async_copy.wait_group(0)  # values of tile i and keys of tile i + 1
    fence_async_shared()
    copy(v_pages, rows, exists, vs.index((i + 1) % 2), D, COPY)
    rows, exists = rows_of(page_row, keys_at, first, end, kv_head, PAGE, NUM_KV_HEADS)
    copy(k_pages, rows, exists, ks.index(i % 2), D, COPY)
    async_copy.commit_group()
    zeros = gl.zeros([scores.shape[0], BN], gl.float32, SCORES)
    coming = warpgroup_mma(q, ks.index((i + 1) % 2).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if SOFTCAP > 0:
        scores = 1.0 - 2.0 / (1.0 + gl.exp2(scores * (2.0 * LOG2E * SCALE / SOFTCAP)))
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position[:, None] - WINDOW
        scores = gl.where(visible, scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * FACTOR)
    weights = gl.exp2(scores * FACTOR - higher[:, None])
    fade = gl.exp2(top - higher)
    total = total * fade + gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, WIDE, 2))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, WIDE))[:, None]
    acc = warpgroup_mma(p, vs.index(i % 2), acc, is_async=True)
    coming, acc = warpgroup_mma_wait(0, deps=(coming, acc))
    return acc, higher, total, coming, rows, exists


@gluon.jit
def hopper_kernel(
    query, query_start, kv_len, pages, k_pages, v_pages, sinks, y,
    S: gl.constexpr, BS: gl.constexpr, STRIDE: gl.constexpr, WIDTH: gl.constexpr,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, PAGE: gl.constexpr, SCALE: gl.constexpr, SOFTCAP: gl.constexpr, WINDOW: gl.constexpr,
    SINKS: gl.constexpr, BG: gl.constexpr, TOKENS: gl.constexpr, BN: gl.constexpr, SKIP_DECODE: gl.constexpr,
    PDL: gl.constexpr = False,
):  # fmt: skip
    """Grid and arguments of `chunk_kernel`. D and DV are one power of two, TOKENS x BG a multiple of 64."""
    launch_next(PDL)
    WARPS: gl.constexpr = gl.num_warps()
    BM: gl.constexpr = TOKENS * BG
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    ROWS: gl.constexpr = gl.SliceLayout(1, COPY)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)

    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)  # the last tiles of a prompt see most keys: they go first
    each = gl.arange(0, BS, layout=LINE)
    begins = gl.load(query_start + each, mask=each < S, other=0) // TOKENS + each
    s = gl.sum(((begins <= tile) & (each < S)).to(gl.int32), 0) - 1
    row = gl.load(query_start + s)
    num_queries = gl.load(query_start + s + 1) - row
    offset = (tile - row // TOKENS - s) * TOKENS  # of the tile's first token in its sequence's share of the step
    length = gl.load(kv_len + s)
    wait(PDL)
    if offset >= num_queries or (SKIP_DECODE and num_queries == 1):
        return

    r = gl.arange(0, BM, layout=ROWS)
    token = offset + r // BG
    head = kv_head * GROUP + r % BG
    inside = (token < num_queries) & (r % BG < GROUP)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    at = row.to(gl.int64) + token
    q = gl.load(
        query + at[:, None] * STRIDE + head[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )  # fmt: skip
    q = gl.convert_layout(q, gl.DotOperandLayout(0, SCORES, 2))
    r = gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES))
    position = length - num_queries + offset + r // BG

    page_row = pages + s.to(gl.int64) * WIDTH
    before = length - num_queries + offset  # position of the tile's first token: every row sees all keys up to it
    end = gl.minimum(before + TOKENS, length)
    first = 0
    if WINDOW > 0:
        first = gl.maximum(before - WINDOW + 1, 0)
    num_tiles = gl.cdiv(end - first, BN)
    masked = num_tiles  # tiles in which some row does not see some key
    if WINDOW == 0:
        masked = num_tiles - (before + 1) // BN

    ks = gl.allocate_shared_memory(k_pages.dtype.element_ty, [2, BN, D], SHARED)
    vs = gl.allocate_shared_memory(k_pages.dtype.element_ty, [2, BN, D], SHARED)
    last = first + (num_tiles - 1) * BN
    keys_at = last + gl.arange(0, BN, layout=ROWS)
    key = last + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))
    rows, exists = rows_of(page_row, keys_at, first, end, kv_head, PAGE, NUM_KV_HEADS)
    copy(k_pages, rows, exists, ks.index(0), D, COPY)
    async_copy.commit_group()
    copy(v_pages, rows, exists, vs.index(0), D, COPY)
    rows, exists = rows_of(page_row, keys_at - BN, first, end, kv_head, PAGE, NUM_KV_HEADS)
    copy(k_pages, rows, exists, ks.index(1), D, COPY)
    async_copy.commit_group()
    async_copy.wait_group(1)
    fence_async_shared()
    scores = gl.zeros([BM, BN], gl.float32, SCORES)
    scores = warpgroup_mma(q, ks.index(0).permute((1, 0)), scores, use_acc=False)
    acc = gl.zeros([BM, D], gl.float32, WIDE)
    top = gl.full([BM], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([BM], gl.float32, gl.SliceLayout(1, SCORES))
    for i in range(0, masked):
        acc, top, total, scores, rows, exists = attend_tile(
            i, q, acc, top, total, scores, rows, exists, keys_at - (i + 2) * BN, key - i * BN, position, page_row,
            k_pages, v_pages, ks, vs, kv_head, first, end, D, PAGE, NUM_KV_HEADS, BN, SCALE, SOFTCAP, WINDOW, True,
            COPY, WIDE,
        )  # fmt: skip
    for i in range(masked, num_tiles):
        acc, top, total, scores, rows, exists = attend_tile(
            i, q, acc, top, total, scores, rows, exists, keys_at - (i + 2) * BN, key - i * BN, position, page_row,
            k_pages, v_pages, ks, vs, kv_head, first, end, D, PAGE, NUM_KV_HEADS, BN, SCALE, SOFTCAP, WINDOW, False,
            COPY, WIDE,
        )  # fmt: skip
    async_copy.wait_group(0)

    if SINKS:
        h = kv_head * GROUP + r % BG
        sink = gl.load(sinks + h, mask=r % BG < GROUP, other=0.0).to(gl.float32) * LOG2E
        higher = gl.maximum(top, sink)
        fade = gl.exp2(top - higher)
        norm = fade / (total * fade + gl.exp2(sink - higher))
    else:
        norm = 1.0 / gl.where(total > 0, total, 1.0)
    out = acc * gl.convert_layout(norm, gl.SliceLayout(1, WIDE))[:, None]
    out = gl.convert_layout(out.to(y.dtype.element_ty), COPY)
    gl.store(y + (at * NUM_HEADS + head)[:, None] * D + d[None, :], out, mask=inside[:, None] & (d < D)[None, :])
