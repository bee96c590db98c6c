"""Definition of `ingot::PagedAttention` in torch.

Sequences with the same number of query tokens are computed together, as long as their key counts are within a factor
of two of each other; so a decode step is a few batched calls and a prompt is a call of its own. Keys are gathered by
slot, only those in reach, and padded by repeating the last valid one, masked: what a page holds past `kv_len` is never
read, so it may be anything, NaN included.

Drafts may be a tree (Miao et al., arXiv:2305.09781): each node has a slot of its own among the last `TREE` keys, and a
query sees its ancestors alone. A path's nodes have consecutive positions, wherever they lie.

Pages of 8 bits hold numbers that are multiplied by a scale, one for all heads or one for each; attention over them is
in fp32.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...engines.errors import EngineError
from ..quantise_tokens.reference import LIMITS, round_to

TREE = 32  # last keys of a sequence that `ancestors` has bits for


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    slots: torch.Tensor,
    query_start: torch.Tensor,
    kv_len: torch.Tensor,
    pages: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    ancestors: torch.Tensor | None = None,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """query [T, H*D] (or packed q|k|v with key and value None) -> [T, H*Dv]; the pools are updated in place.

    Raises EngineError: pages of 8 bits without scales, or other pages that are not of the query's type.
    """
    num_tokens = query.shape[0]
    if key is None or value is None:
        widths = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * v_head_dim)
        query, key, value = query.split(widths, -1)
    query = query.reshape(num_tokens, num_heads, head_dim)
    keys, values = k_pages.view(-1, num_kv_heads, head_dim), v_pages.view(-1, num_kv_heads, v_head_dim)
    slots = slots.long()
    for pool, new, unit in ((keys, key, k_scale), (values, value, v_scale)):
        _check(pool, new, unit, num_kv_heads)
        _bits(pool).index_copy_(0, slots, _bits(_stored(new.reshape(num_tokens, *pool.shape[1:]), unit, pool.dtype)))

    y = query.new_zeros(num_tokens, num_heads, v_head_dim)
    starts, lengths = query_start.tolist(), kv_len.tolist()
    for sequences in _groups(starts, lengths):
        num_queries = starts[sequences[0] + 1] - starts[sequences[0]]
        rows = torch.tensor([starts[s] for s in sequences]).unsqueeze(1) + torch.arange(num_queries)  # [B, n]
        bits = None if ancestors is None else ancestors[rows]
        slot, mask = _reach(sequences, lengths, num_queries, pages, k_pages.shape[1], window, bits)
        q = query[rows].transpose(1, 2)  # [B, H, n, D]
        k = _read(keys, slot, k_scale).transpose(1, 2)  # [B, Hkv, L, D]
        v = _read(values, slot, v_scale).transpose(1, 2)  # [B, Hkv, L, Dv]
        y[rows] = _attend(q.to(k.dtype), k, v, mask, sinks, scale, softcap).transpose(1, 2).to(y.dtype)
    return y.reshape(num_tokens, num_heads * v_head_dim)


def _check(pool: torch.Tensor, new: torch.Tensor, scale: torch.Tensor | None, num_kv_heads: int) -> None:
    quantised = pool.dtype in LIMITS
    if quantised and scale is None:
        raise EngineError(f"KV pages of {pool.dtype} need a scale, and PagedAttention was given none")
    if not quantised and (scale is not None or pool.dtype != new.dtype):
        scaled = " and a scale" if scale is not None else ""
        raise EngineError(f"PagedAttention was given {new.dtype} for KV pages of {pool.dtype}{scaled}")
    if scale is not None and scale.shape not in ((1,), (num_kv_heads,)):
        raise EngineError(f"the scale of KV pages has the shape {list(scale.shape)}, expected [1] or [{num_kv_heads}]")


def _stored(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x [T, Hkv, D] as the pages hold it."""
    return x if scale is None else round_to(x.float() / scale[:, None], dtype)


def _read(pool: torch.Tensor, slot: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What lies in slots [B, L] of pool [slots, Hkv, D]: [B, L, Hkv, D], fp32 where there is a scale."""
    found = _bits(pool).index_select(0, slot.flatten()).view(pool.dtype).unflatten(0, slot.shape)
    return found if scale is None else found.float() * scale[:, None]


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that torch can index: it cannot index fp8."""
    return x.view(torch.int8) if x.dtype is torch.float8_e4m3fn else x


def _groups(starts: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Sequences computed together: equal query counts, the longest at most twice (plus 64 keys) the shortest."""
    counts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    order = sorted((s for s in range(len(lengths)) if counts[s]), key=lambda s: (counts[s], lengths[s]))
    group: list[int] = []
    for s in order:
        if group and (counts[s] != counts[group[0]] or lengths[s] > 2 * lengths[group[0]] + 64):
            yield group
            group = []
        group.append(s)
    if group:
        yield group


def _reach(
    sequences: list[int], lengths: list[int], num_queries: int, pages: torch.Tensor, page_size: int, window: int,
    bits: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Slots [B, L] of the keys in reach of a sequence, and which query sees which: [B, 1, n, L], or None for all.

    bits [B, n]: of `ancestors`.
    """
    length = torch.tensor([lengths[s] for s in sequences]).unsqueeze(1)  # [B, 1]
    first = torch.zeros_like(length)
    if window:  # nodes of a tree are at earlier positions than their places say
        first = (length - num_queries - window + 1 - (0 if bits is None else TREE)).clamp(min=0)
    position = first + torch.arange(int((length - first).max()))  # [B, L]
    known = torch.minimum(position, length - 1)
    page = pages[torch.tensor(sequences)].long().gather(1, known // page_size)
    slot = page * page_size + known % page_size
    if (
        num_queries == 1 and len(sequences) == 1 and bits is None
    ):  # nothing is padded, and the one query sees all that is in reach
        return slot, None
    asker = (length - num_queries + torch.arange(num_queries)).unsqueeze(-1)  # [B, n, 1] position of each query
    keys = position.unsqueeze(1)  # [B, 1, L]
    mask = keys <= asker
    if bits is not None:
        seen = (bits.unsqueeze(-1) >> torch.arange(TREE)) & 1  # [B, n, TREE]
        place = keys - (length.unsqueeze(1) - TREE)  # among the bits; negative: before them
        mask = mask & ((place < 0) | (seen.gather(-1, place.clamp(0, TREE - 1).expand_as(mask)) > 0))
        hidden = F.pad((1 - seen).cumsum(-1), (1, 0))  # before each bit
        own = (asker - (length.unsqueeze(1) - TREE)).clamp(0, TREE)
        keys = keys - hidden.gather(-1, place.clamp(0, TREE).expand_as(mask))
        asker = asker - hidden.gather(-1, own)
    if window:
        mask = mask & (keys > asker - window)
    return slot, mask.unsqueeze(1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Softmax attention: q [B, H, n, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], mask [B, 1, n, L] -> [B, H, n, Dv]."""
    if not softcap and sinks is None:
        if q.shape[2] == 1:  # the heads that share keys as queries of one call: 7x in bf16 (32 rows of 300 keys)
            shared = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
            return F.scaled_dot_product_attention(shared, k, v, mask, scale=scale).view(*q.shape[:3], -1)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    batch, num_kv_heads, num_queries = q.shape[0], k.shape[1], q.shape[2]
    grouped = q.float().reshape(batch, num_kv_heads, -1, q.shape[3])  # [B, Hkv, G*n, D]
    scores = (grouped @ k.float().transpose(-1, -2) * scale).unflatten(2, (-1, num_queries))  # [B, Hkv, G, n, L]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    if sinks is None:
        weights = scores.softmax(-1)
    else:  # one more column, dropped after the softmax
        sink = sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return (weights.flatten(2, 3) @ v.float()).view(batch, q.shape[1], num_queries, -1).to(q.dtype)
