"""x as two matrices, its even and its odd columns, for products with int4 whose bytes hold a column of each.

The tensor cores read both from shared memory then, and no thread takes pairs apart. Within 32 columns their order is
that in which a thread that reads four neighbouring bytes of the weight has the numbers that a wgmma wants of it: of
each 16 columns of a half, 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 in thread t of four (PTX ISA, "Register Fragments for
wgmma.mma_async.m64nNk16"). `quantised_kernel` permutes the weight's bytes alike.
"""

import triton
import triton.language as tl

from ..pdl import begin
from .numbers import both

COLUMNS = 32  # of which a multiple is taken apart
BLOCK = 1024  # pairs a program


@triton.jit
def halves_kernel(
    x, y, M, K: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """x [M, K] in 16 bits -> y [2, M, K / 2], or TOGETHER [M, K / 32, 2, 16]. K is a multiple of 32."""
    begin(PDL)
    num = tl.cast(M, tl.int64) * (K // 2)  # one row is a constant
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = at // 16 * 16 + at // 2 % 4 * 4 + at // 8 % 2 * 2 + at % 2
    words = x.to(tl.pointer_type(tl.int32), bitcast=True)
    even, odd = both(tl.load(words + pair, mask=at < num, other=0), y.dtype.element_ty)
    y_at = y + at // 16 * 32 + at % 16 if TOGETHER else y + at
    tl.store(y_at, even, mask=at < num)
    tl.store(y_at + 16 if TOGETHER else y_at + num, odd, mask=at < num)
