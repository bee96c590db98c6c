"""QuantiseTokens on the GPU: a token, or some groups of its columns, a program; and QuantizeLinear with one scale."""

from math import prod

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic
from .store import over, rounded, scale_of

BLOCK = 1024  # numbers of a program where groups have scales of their own
SHARE = 2048  # columns that a program rounds at least where several share a token
ELEMENTS = "int8", "float8_e4m3fn"


@triton.jit
def quantise_tokens_kernel(
    x, values, scale, K: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """COUNT groups of GROUP columns a program; WIDTH: the power of two that holds a group."""
    begin(PDL)
    DTYPE: tl.constexpr = values.dtype.element_ty
    REACH: tl.constexpr = 127.5 if DTYPE == tl.int8 else 448.0
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    i = tl.arange(0, WIDTH)
    k = g[:, None] * GROUP + i[None, :]
    inside = (i < GROUP)[None, :] & (k < K)
    v = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    s = scale_of(tl.max(tl.abs(v), 1), REACH)
    tl.store(scale + row * ((K + GROUP - 1) // GROUP) + g, s, mask=g * GROUP < K)
    tl.store(values + row * K + k, rounded(over(v, s[:, None]), DTYPE), mask=inside)


@triton.jit
def quantise_shares_kernel(
    x, values, scale, K: tl.constexpr, WIDTH: tl.constexpr, SHARE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tokens, shares): each program finds the largest number of its whole token, and rounds SHARE columns."""
    begin(PDL)
    DTYPE: tl.constexpr = values.dtype.element_ty
    REACH: tl.constexpr = 127.5 if DTYPE == tl.int8 else 448.0
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * SHARE + tl.arange(0, SHARE)
    v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    i = tl.arange(0, WIDTH)
    whole = tl.load(x + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    s = scale_of(tl.max(tl.abs(whole), 0), REACH)
    tl.store(scale + row, s, mask=tl.program_id(1) == 0)
    tl.store(values + row * K + k, rounded(over(v, s), DTYPE), mask=k < K)


@triton.jit
def quantize_kernel(x, scale, values, SIZE, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """x / scale, one scale for all."""
    begin(PDL)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32)
    s = tl.load(scale).to(tl.float32)
    tl.store(values + i, rounded(over(v, s), values.dtype.element_ty), mask=i < SIZE)


def tactics(site: Site) -> list[Tactic]:
    """Programs of a few sizes; [] for types that it does not know. QuantizeLinear: with one scale, no zero point.

    Rounding takes longer than finding the largest number of a token, so where there are few tokens, and multiprocessors
    to spare, programs round a share of a token each."""
    x, values = site.inputs[0], site.outputs[0]
    assert x is not None
    if values.dtype not in ELEMENTS or x.dtype not in POINTERS or len(x.shape) != 2:
        return []
    if site.op == "QuantizeLinear":
        return _static(site)
    (rows, depth), group = x.shape, site.attributes["group"] or x.shape[1]
    width = triton.next_power_of_2(group)
    count = max(1, min(BLOCK // width, triton.next_power_of_2(-(-depth // group))))
    names = (("x", POINTERS[x.dtype]), ("values", POINTERS[values.dtype]), ("scale", "*fp32"))
    constants = (("K", depth), ("GROUP", group), ("WIDTH", width), ("COUNT", count))
    aligned = ("x", "values") if depth % 16 == 0 else ()
    grid = (rows, -(-depth // (group * count)), 1)
    arguments = (Operand("input", 0), Operand("output", 0), Operand("output", 1))
    choices = (32, 16) if width * count > 8192 else (8, 4) if width * count >= 2048 else (4, 2)
    whole = [
        Tactic(f"warps{warps}", (Launch(Kernel("quantise_tokens.kernel:quantise_tokens_kernel", names, constants,
                                               num_warps=warps, divisible=aligned), grid, arguments),))
        for warps in choices
    ]  # fmt: skip
    share = max(SHARE, triton.next_power_of_2(-(-depth * rows // site.device.num_sms)))
    shares = -(-depth // share)
    if group < depth or shares < 2:
        return whole
    shared = Kernel("quantise_tokens.kernel:quantise_shares_kernel", names,
                    (("K", depth), ("WIDTH", width), ("SHARE", share)), num_warps=8, divisible=aligned)  # fmt: skip
    return [Tactic(f"shares of {share}", (Launch(shared, (rows, shares, 1), arguments),)), *whole]


def _static(site: Site) -> list[Tactic]:
    x, scale, *zero = site.inputs
    assert x is not None and scale is not None
    if prod(scale.shape) != 1 or any(zero) or scale.dtype not in POINTERS:
        return []
    size = prod(x.shape)
    names = (("x", POINTERS[x.dtype]), ("scale", POINTERS[scale.dtype]), ("values", POINTERS[site.outputs[0].dtype]),
             ("SIZE", "i32"))  # fmt: skip
    kernel = Kernel("quantise_tokens.kernel:quantize_kernel", names, (("BLOCK", BLOCK),), divisible=("x", "values"))
    arguments = (Operand("input", 0), Operand("input", 1), Operand("output", 0), size)
    return [Tactic("blocks", (Launch(kernel, (-(-size // BLOCK), 1, 1), arguments),))]
