"""K and V of a step into the pool, on the GPU: a launch of its own, so that whatever reads the pool next sees it all.

Padded tokens write to slot 0, which nobody reads, all at once; any of them may win.
"""

import triton
import triton.language as tl

from ..pdl import begin
from .stored import numbers, stored, unit_of


@triton.jit
def write_kernel(
    key, value, slots, k_pages, v_pages, own_k, own_v, k_scale, v_scale,
    KEY_AT: tl.constexpr, KEY_STRIDE: tl.constexpr, K_WIDTH: tl.constexpr, VALUE_AT: tl.constexpr,
    VALUE_STRIDE: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """K and V of a token to its slot, one program a token. own_k, own_v: to them, too, as they are multiplied."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    i = tl.arange(0, BLOCK)
    k = tl.load(key + token * KEY_STRIDE + KEY_AT + i, mask=i < K_WIDTH, other=0.0)
    v = tl.load(value + token * VALUE_STRIDE + VALUE_AT + i, mask=i < V_WIDTH, other=0.0)
    k = stored(k, unit_of(k_scale, tl.minimum(i, K_WIDTH - 1) // D, K_STEP), k_pages)
    v = stored(v, unit_of(v_scale, tl.minimum(i, V_WIDTH - 1) // DV, V_STEP), v_pages)
    tl.store(k_pages + slot * K_WIDTH + i, k, mask=i < K_WIDTH)
    tl.store(v_pages + slot * V_WIDTH + i, v, mask=i < V_WIDTH)
    if own_k is not None:
        tl.store(own_k + token * K_WIDTH + i, numbers(k, own_k.dtype.element_ty), mask=i < K_WIDTH)
        tl.store(own_v + token * V_WIDTH + i, numbers(v, own_v.dtype.element_ty), mask=i < V_WIDTH)
