"""K and V of a step into the pool, on the GPU: a launch of its own, so that whatever reads the pool next sees it all.

Padded tokens write to slot 0, which nobody reads, all at once; any of them may win.
"""

import triton
import triton.language as tl

from ..pdl import begin


@triton.jit
def write_kernel(
    key, value, slots, k_pages, v_pages,
    KEY_AT: tl.constexpr, KEY_STRIDE: tl.constexpr, K_WIDTH: tl.constexpr, VALUE_AT: tl.constexpr,
    VALUE_STRIDE: tl.constexpr, V_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Copies K and V of a token to its slot, one program a token."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    i = tl.arange(0, BLOCK)
    k = tl.load(key + token * KEY_STRIDE + KEY_AT + i, mask=i < K_WIDTH, other=0.0)
    v = tl.load(value + token * VALUE_STRIDE + VALUE_AT + i, mask=i < V_WIDTH, other=0.0)
    tl.store(k_pages + slot * K_WIDTH + i, k, mask=i < K_WIDTH)
    tl.store(v_pages + slot * V_WIDTH + i, v, mask=i < V_WIDTH)
