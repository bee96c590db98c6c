"""The last step of a kernel that leaves a token in 8 bits: scales from what is in registers, rounding, storing."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's, which knows no PTX and rounds otherwise
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds to the nearest integer, ties to even


@triton.jit
def scale_of(reach, REACH: tl.constexpr):
    """The scale that covers +-reach: as the reference, never subnormal, 1 where all is 0."""
    return tl.where(reach > 0, tl.maximum(tl.div_rn(reach, REACH), 1.1754943508222875e-38), 1.0)


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """The nearest int8 or E4M3 of fp32 numbers, ties to even, saturated.

    The GPU's conversion to E4M3 does all of it. Interpreted, E4M3 has steps of an eighth of the power of two below a
    number, 2^-9 at least: adding 1.5 * 2^20 times that power and taking it away leaves a multiple of them, so that the
    conversion has nothing left to round.
    """
    if DTYPE == tl.int8:
        return tl.clamp(v + NEAREST - NEAREST, -128.0, 127.0).to(tl.int8)
    elif INTERPRETED:
        power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        large = tl.maximum(power, 0.015625) * 1572864.0
        return tl.clamp(v + large - large, -448.0, 448.0).to(DTYPE)
    else:
        return v.to(DTYPE)


@triton.jit
def over(v, s):
    """v / s, fp32, s one number or one for each row of v.

    1 / s is divided once; a product with it is off by one unit in the last place at most, and what that leaves of v,
    which a fused multiply-add has exactly, corrects it (Markstein, IBM J. Res. Dev. 34, 1990). A division of its own
    for each number takes longer than all else that is done to it.
    """
    if INTERPRETED:
        return tl.div_rn(v, tl.zeros_like(v) + s)
    else:
        inverse = tl.zeros_like(v) + tl.div_rn(s * 0 + 1.0, s)
        divisor = tl.zeros_like(v) + s
        q = v * inverse
        return tl.fma(tl.fma(-q, divisor, v), inverse, q)


@triton.jit
def store_token(v, values, scale, row, D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """v [BLOCK] fp32, 0 from D on, is token number `row` of values [T, D] and scale [T, ceil(D / GROUP)]; GROUP: a
    power of two, or 0."""
    DTYPE: tl.constexpr = values.dtype.element_ty
    REACH: tl.constexpr = 127.5 if DTYPE == tl.int8 else 448.0
    i = tl.arange(0, BLOCK)
    if GROUP > 0:
        COUNT: tl.constexpr = (D + GROUP - 1) // GROUP
        blocks = tl.reshape(v, [BLOCK // GROUP, GROUP])
        s = scale_of(tl.max(tl.abs(blocks), 1), REACH)
        g = tl.arange(0, BLOCK // GROUP)
        tl.store(scale + row * COUNT + g, s, mask=g < COUNT)
        scaled = tl.reshape(over(blocks, s[:, None]), [BLOCK])
    else:
        s = scale_of(tl.max(tl.abs(v), 0), REACH)
        tl.store(scale + row, s)
        scaled = over(v, s)
    tl.store(values + row * D + i, rounded(scaled, DTYPE), mask=i < D)
