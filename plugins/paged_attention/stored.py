"""What pages of 8 bits hold, on the GPU: keys and values over a scale, rounded to int8 or fp8 (E4M3).

Rounding to fp8 is integer arithmetic: it happens once a token, and so it is the same on every GPU and in the
interpreter. Reading happens once a key and step: that is the GPU's own conversion from compute capability 8.9 on;
before it, pages of fp8 are bytes, converted by bits.
"""

import triton
import triton.language as tl

LOWEST_NORMAL = tl.constexpr(0.015625)  # 2^-6, of fp8
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: numbers below 2^22 added to it are rounded to integers
TO_NINTHS = tl.constexpr(16384.0)  # 2^14: numbers below 2^-6 added to it are rounded to multiples of 2^-9


@triton.jit
def unit_of(scale, head, STEP: tl.constexpr):
    """What the numbers in the pages are multiplied by; 1 without scales. STEP: 1 with one for each head, else 0."""
    if scale is None:
        return 1.0
    else:
        return tl.load(scale + head * STEP)


@triton.jit
def stored(x, unit, pages):
    """x over unit as the pages hold it: to the nearest, ties to even, saturated; x itself in pages of its type."""
    T: tl.constexpr = pages.dtype.element_ty
    if T == x.dtype:
        return x
    else:
        x = tl.math.div_rn(x.to(tl.float32), unit)
        if T == tl.int8:
            return (tl.minimum(tl.maximum(x, -128.0), 127.0) + TO_INTEGER - TO_INTEGER).to(tl.int8)
        else:
            return _fp8_bits(x).to(T, bitcast=True)


@triton.jit
def _fp8_bits(x):
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    whole = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    size = tl.minimum(whole.to(tl.float32, bitcast=True), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # three bits of the mantissa stay, and the exponent's bias is 7 instead of 127
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (size + TO_NINTHS).to(tl.int32, bitcast=True) & 0xF
    found = tl.where(size < LOWEST_NORMAL, small, normal)
    return (tl.where(whole > 0x7F800000, 0x7F, found) | sign).to(tl.uint8)  # NaN stays NaN


@triton.jit
def numbers(x, T: tl.constexpr):
    """Stored numbers in the floating type T, which holds each of them exactly."""
    if x.dtype == tl.uint8:  # fp8: exponent and mantissa at their places in fp16, whose bias is 15 instead of 7
        size = x.to(tl.int16) & 0x7F
        half = tl.where(size == 0x7F, 0x7E00, size << 7) | ((x.to(tl.int16) & 0x80) << 8)
        return (half.to(tl.int16).to(tl.float16, bitcast=True) * 256.0).to(T)
    elif x.dtype == tl.int8 and T == tl.float16:  # number + 128 in the mantissa of 1024
        return ((x.to(tl.int16) & 0xFF ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    else:
        return x.to(T)


@triton.jit
def factors(q, pages):
    """Queries in the type in which they are multiplied with what `pages` hold: their own, but fp16 where they are bf16
    and keys are numbers of 8 bits, or were.

    From fp8 to fp16 is one instruction for two numbers, to bf16 five. A query has more bits there than in bf16, and
    none is as large as fp16's largest number; one that were would be cut off at it.
    """
    if pages.dtype.element_ty != tl.bfloat16 and q.dtype == tl.bfloat16:
        return tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    else:
        return q


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's, which knows no PTX


@triton.jit
def as_stored(x, unit, inverse, pages):
    """`stored` of fp32 numbers, 1 / unit at hand. Where the GPU converts to fp8 by itself it is its own instruction,
    which does the same."""
    T: tl.constexpr = pages.dtype.element_ty
    if INTERPRETED or T == tl.int8 or T == tl.uint8:
        return stored(x, unit, pages)
    else:  # the division as in `quantise_tokens/store.py: over`; what saturates anyhow may be infinite
        divisor, factor = tl.zeros_like(x) + unit, tl.zeros_like(x) + inverse
        q = x * factor
        return tl.where(tl.abs(q) < 65536.0, tl.fma(tl.fma(-q, divisor, x), factor, q), q).to(T)


@triton.jit
def column(pairs, UPPER: tl.constexpr, T: tl.constexpr, DTYPE: tl.constexpr):
    """The first or the second of two numbers of type T in 16 bits, in DTYPE; two at once where both are floats that the
    GPU converts."""
    if INTERPRETED or T == tl.int8 or T == tl.uint8 or DTYPE != tl.float16:
        byte = (pairs >> 8 if UPPER else pairs & 0xFF).to(tl.uint8)
        return numbers(byte.to(T, bitcast=True), DTYPE)
    else:
        PICK: tl.constexpr = "0x4431" if UPPER else "0x4420"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; .reg .b16 low, high; prmt.b32 both, $1, 0, " + PICK
            + "; mov.b32 {low, high}, both; cvt.rn.f16x2.e4m3x2 $0, low; }",
            "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
