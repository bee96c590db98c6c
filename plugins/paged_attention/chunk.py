"""Attention of prompt chunks on the GPU, decode rows among them: tiles of query tokens x the heads of a group.

The grid is static, so a tile finds its sequence itself: if sequence s takes the tiles from
`query_start[s] // TOKENS + s` on, every sequence has room for its own (at most one more than it fills), and counting
the sequences that begin at or before a tile is one vector load. Tiles past their sequence's tokens exit at once.

With pages of 8 bits, keys and values of the step itself are read from copies that are already in fp16 (`write.py`):
tiles would convert the same keys again and again, and between conversions the tensor cores are idle.
"""

import triton
import triton.language as tl

from ..pdl import launch_next, wait
from .attend import LOWEST, TREE, attend, finish
from .stored import unit_of


@triton.jit
def chunk_kernel(
    query, query_start, kv_len, pages, k_pages, v_pages, sinks, y, own_k, own_v, k_scale, v_scale,
    S: tl.constexpr, BS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, PAGE: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, BG: tl.constexpr, TOKENS: tl.constexpr, BN: tl.constexpr, SKIP_DECODE: tl.constexpr,
    K_STEP: tl.constexpr, V_STEP: tl.constexpr, PAST: tl.constexpr,
    PDL: tl.constexpr = False, ancestors=None,
):  # fmt: skip
    """Grid (key heads, T // TOKENS + S). SKIP_DECODE: sequences with one query token are left to `decode_kernel`.

    PAST: any, none or some. The loop over what earlier steps left in 8 bits has all matrix instructions of the kernel
    wait for one another (ptxas C7515), so a kernel without it takes the sequences that begin in this step."""
    launch_next(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last tiles of a prompt see most keys: they go first
    each = tl.arange(0, BS)
    begins = tl.load(query_start + each, mask=each < S, other=0) // TOKENS + each
    s = tl.sum(((begins <= tile) & (each < S)).to(tl.int32), 0) - 1
    row = tl.load(query_start + s)
    num_queries = tl.load(query_start + s + 1) - row
    offset = (tile - row // TOKENS - s) * TOKENS  # of the tile's first token in its sequence's share of the step
    length = tl.load(kv_len + s)
    k_unit, v_unit = unit_of(k_scale, kv_head, K_STEP), unit_of(v_scale, kv_head, V_STEP)
    wait(PDL)
    if offset >= num_queries or (SKIP_DECODE and num_queries == 1):
        return
    if PAST == "none" and length != num_queries:
        return
    if PAST == "some" and length == num_queries:
        return

    r = tl.arange(0, TOKENS * BG)
    token = offset + r // BG
    head = kv_head * GROUP + r % BG
    inside = (token < num_queries) & (r % BG < GROUP)
    position = length - num_queries + token
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    at = row.to(tl.int64) + token
    q = tl.load(
        query + at[:, None] * STRIDE + head[:, None] * D + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )
    acc = tl.zeros([TOKENS * BG, BDV], tl.float32)
    top = tl.full([TOKENS * BG], LOWEST, tl.float32)
    total = tl.zeros([TOKENS * BG], tl.float32)
    page_row = pages + s.to(tl.int64) * WIDTH
    before = length - num_queries + offset  # position of the tile's first token: every row sees all keys below it
    end = tl.minimum(before + TOKENS, length)
    first = 0
    seen = None
    trunk = length - TREE
    if ancestors is not None:
        seen = tl.load(ancestors + at, mask=inside, other=-1)
    if WINDOW > 0:
        first = tl.maximum(before - WINDOW + 1 - (0 if ancestors is None else TREE), 0)
    if own_k is not None:
        old = length - num_queries  # keys that earlier steps wrote
        if PAST != "none":
            acc, top, total = attend(
                q, acc, top, total, position, page_row, k_pages, v_pages, kv_head, k_unit, first, old, old,
                NUM_KV_HEADS, D, DV, BD, BDV, PAGE, BN, SCALE, SOFTCAP, WINDOW, True, seen, trunk,
            )  # fmt: skip
        first = tl.maximum(first, old)
        page_row = row.to(tl.int64) - old
        k_pages, v_pages = own_k, own_v
    IN: tl.constexpr = 0 if own_k is not None else PAGE
    if WINDOW == 0:
        certain = before + 1
        if ancestors is not None:
            certain = tl.minimum(certain, trunk)
        full = first + tl.maximum(certain - first, 0) // BN * BN
        acc, top, total = attend(
            q, acc, top, total, position, page_row, k_pages, v_pages, kv_head, k_unit, first, full, full,
            NUM_KV_HEADS, D, DV, BD, BDV, IN, BN, SCALE, SOFTCAP, 0, False,
        )  # fmt: skip
        first = full
    acc, top, total = attend(
        q, acc, top, total, position, page_row, k_pages, v_pages, kv_head, k_unit, first, end, end,
        NUM_KV_HEADS, D, DV, BD, BDV, IN, BN, SCALE, SOFTCAP, WINDOW, True, seen, trunk,
    )  # fmt: skip
    out = finish(acc, top, total, v_unit, sinks, head, inside, SINKS)
    at = (at * NUM_HEADS + head)[:, None] * DV + dv[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :])
