"""Numbers of few bits as floating point, in registers: what every kernel that reads quantised weights begins with.

Four-bit numbers come as halves of bytes. The half, its sign bit turned, is put into the mantissa of a float whose
exponent makes it an integer, so that one bit operation and one subtraction do what a conversion takes longer for.
E4M3 is read by the hardware from compute capability 8.9 on; before, its bits are moved to where a float has them.
"""

import triton
import triton.language as tl

from ..quantise_tokens.store import INTERPRETED

HARDWARE_FP8 = 89  # compute capability


@triton.jit
def half_byte(bits, DTYPE: tl.constexpr):
    """-8 .. 7 of the two's complement 0 .. 15 (uint8), in DTYPE; exact."""
    turned = bits ^ 8  # number + 8
    if DTYPE == tl.bfloat16:
        return (turned.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0  # 0x4300: 128
    elif DTYPE == tl.float16:
        return (turned.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0  # 0x6400: 1024
    else:
        return (turned.to(tl.int8) - 8).to(DTYPE)


@triton.jit
def half_bytes(stored, UPPER: tl.constexpr, DTYPE: tl.constexpr):
    """`half_byte` of the lower or the upper halves of bytes. For 16-bit floats four bytes, which lie in a register, at
    once: their halves are turned, two are spread over a register with the upper byte of 128 (1024) before them, and one
    operation takes 128 + 8 (1024 + 8) away."""
    if INTERPRETED or (DTYPE != tl.bfloat16 and DTYPE != tl.float16):
        return half_byte(stored >> 4 if UPPER else stored & 15, DTYPE)
    else:
        MOVE: tl.constexpr = "shr.u32 a, $2, 4; " if UPPER else "mov.b32 a, $2; "
        BASE: tl.constexpr = "0x43434343" if DTYPE == tl.bfloat16 else "0x64646464"
        LESS: tl.constexpr = "0xC308C308" if DTYPE == tl.bfloat16 else "0xE408E408"
        ONE: tl.constexpr = "0x3F803F80" if DTYPE == tl.bfloat16 else "0x3C003C00"
        KIND: tl.constexpr = "bf16x2" if DTYPE == tl.bfloat16 else "f16x2"
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, one, less; " + MOVE + "lop3.b32 a, a, 0x0F0F0F0F, 0x08080808, 0x6A; "
            + "prmt.b32 b, a, " + BASE + ", 0x4342; prmt.b32 a, a, " + BASE + ", 0x4140; "
            + "mov.b32 one, " + ONE + "; mov.b32 less, " + LESS + "; fma.rn." + KIND + " $0, a, one, less; fma.rn."
            + KIND + " $1, b, one, less; }",
            "=r,=r,r", [stored], dtype=tl.int16, is_pure=True, pack=4,
        )  # fmt: skip
        return bits.to(DTYPE, bitcast=True)


@triton.jit
def both(words, DTYPE: tl.constexpr):
    """The first and the second of the two 16-bit floats in words of 32 bits."""
    return words.to(tl.int16).to(DTYPE, bitcast=True), (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def e4m3(bits):
    """E4M3 as fp32: sign and exponent where fp32 has them, the difference of the exponents' biases multiplied away;
    subnormal numbers come out right, too."""
    b = bits.to(tl.int32)
    return ((b & 128) << 24 | (b & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def byte(stored, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """int8 or fp8 numbers in DTYPE. KIND `bits`: E4M3 in uint8."""
    if KIND == "bits":
        return e4m3(stored).to(DTYPE)
    else:
        return stored.to(DTYPE)


@triton.jit
def zero_points(zero, at, there, KIND: tl.constexpr):
    """Zero points number `at` as fp32; int4 ones lie two in a byte."""
    if KIND == "int4":
        pair = tl.load(zero + at // 2, mask=there, other=0)
        return half_byte(pair >> ((at % 2) * 4).to(tl.uint8) & 15, tl.float32)
    else:
        return tl.load(zero + at, mask=there, other=0).to(tl.float32)


@triton.jit
def scaled_half_bytes(stored, scale, zero, DTYPE: tl.constexpr, ZERO: tl.constexpr):
    """(number - zero) * scale of the lower and of the upper halves of bytes, rounded to DTYPE, 16-bit floats.

    stored [N, B]; scale [N, 1] in fp32, taken as the sum of two DTYPEs, so that the result is as exact as if it were
    rounded once; zero [N, 1], whole numbers. Numbers become mantissas of 128 (1024) as in `half_bytes`; the upper byte
    is set by a permutation. Seven operations for eight numbers, and twelve for what is subtracted and scaled.
    """
    if INTERPRETED:
        low, high = half_byte(stored & 15, tl.float32), half_byte(stored >> 4, tl.float32)
        if ZERO:
            low, high = low - zero, high - zero
        return (low * scale).to(DTYPE), (high * scale).to(DTYPE)
    else:
        BF16: tl.constexpr = DTYPE == tl.bfloat16
        MAGIC: tl.constexpr = "0x43434343" if BF16 else "0x64646464"  # upper byte of 128, 1024
        BASE: tl.constexpr = -136.0 if BF16 else -1032.0
        ONE: tl.constexpr = "0x3F803F80" if BF16 else "0x3C003C00"
        FMA: tl.constexpr = "fma.rn.bf16x2" if BF16 else "fma.rn.f16x2"
        coarse = scale.to(DTYPE)
        fine = (scale - coarse.to(tl.float32)).to(DTYPE)
        less = (BASE - zero if ZERO else scale * 0 + BASE).to(DTYPE)
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 e, o, a, b, c, d, one, none; lop3.b32 e, $4, 0x0F0F0F0F, 0x08080808, 0x6A; "
            + "shr.u32 o, $4, 4; lop3.b32 o, o, 0x0F0F0F0F, 0x08080808, 0x6A; "
            + "prmt.b32 a, e, " + MAGIC + ", 0x4140; prmt.b32 b, e, " + MAGIC + ", 0x4342; "
            + "prmt.b32 c, o, " + MAGIC + ", 0x4140; prmt.b32 d, o, " + MAGIC + ", 0x4342; "
            + "mov.b32 one, " + ONE + "; mov.b32 none, 0x80008000; "
            + FMA + " a, a, one, $9; " + FMA + " b, b, one, $10; "
            + FMA + " c, c, one, $9; " + FMA + " d, d, one, $10; "
            + FMA + " e, a, $7, none; " + FMA + " $0, a, $5, e; "
            + FMA + " e, b, $8, none; " + FMA + " $1, b, $6, e; "
            + FMA + " e, c, $7, none; " + FMA + " $2, c, $5, e; "
            + FMA + " e, d, $8, none; " + FMA + " $3, d, $6, e; }",
            "=r,=r,=r,=r,r,r,r,r,r,r,r",
            [stored, coarse.to(tl.int16, bitcast=True), fine.to(tl.int16, bitcast=True),
             less.to(tl.int16, bitcast=True)],
            dtype=(tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
        return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


@triton.jit
def await_products():
    """Waits for the products issued so far (compute capability 9.0): tensor cores read the weights' registers when they
    come to them, and ptxas takes those of the slice before to be free where the loop begins again
    (`sass.py: overwritten_operands`)."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
