"""(x - zero) * scale in fp32, rounded once: a block of columns of one row a program."""

from typing import Any

import triton
import triton.language as tl

from ..pdl import begin
from ..quantised_linear.numbers import HARDWARE_FP8, byte, half_byte, zero_points
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

BLOCK = 1024  # columns
WORDS = 512  # of eight numbers, of a program
KINDS = {"int4": "int4", "int8": "int8", "float8_e4m3fn": "fp8"}


@triton.jit
def dequantise_kernel(
    x, scale, zero, y, K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    GROUP: tl.constexpr, SCALE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """KIND: see `../quantised_linear/numbers.py`. SCALE: one, rows or groups of GROUP columns. K is even for int4."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    if KIND == "int4":
        pair = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        w = tl.load(x + row * (K // 2) + pair, mask=pair * 2 < K, other=0)
        v = tl.reshape(tl.join(half_byte(w & 15, tl.float32), half_byte(w >> 4, tl.float32)), [BLOCK])
    else:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        v = byte(tl.load(x + row * K + at, mask=at < K, other=0.0), KIND, tl.float32)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    if SCALE == "groups":
        at = row * ((K + GROUP - 1) // GROUP) + k // GROUP
    elif SCALE == "rows":
        at = row + k * 0
    else:
        at = k * 0
    if ZERO:
        v -= zero_points(zero, at, inside, KIND)
    v *= tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * K + k, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dequantise_words_kernel(
    x, scale, zero, y, N: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """As `dequantise_kernel` of int4 [N, K], eight numbers, which have one scale, at a time: a word is read, 16 bytes
    are written. BLOCK words a program, of all rows; GROUP 0: one scale a row."""
    begin(PDL)
    # times one, which the compiler does not know: else a thread would read four neighbouring words, and threads would
    # have to exchange what they write
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) * tl.num_programs(1)
    inside = at < N * (K // 8)
    word = tl.load(x.to(tl.pointer_type(tl.int32), bitcast=True) + at, mask=inside, other=0)
    row, column = at // (K // 8), at % (K // 8) * 8
    of = row * ((K + GROUP - 1) // GROUP) + column // GROUP if GROUP > 0 else row
    s = tl.load(scale + of, mask=inside, other=0.0)
    z = zero_points(zero, of, inside, "int4") if ZERO else 0.0
    word ^= -0x77777778  # 0x88888888: of each number plus 8
    v = tl.join(tl.join(tl.join(_number(word, 0, z, s), _number(word, 4, z, s)),
                        tl.join(_number(word, 2, z, s), _number(word, 6, z, s))),
                tl.join(tl.join(_number(word, 1, z, s), _number(word, 5, z, s)),
                        tl.join(_number(word, 3, z, s), _number(word, 7, z, s))))  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * (BLOCK * 8) + tl.arange(0, BLOCK * 8)
    tl.store(y + k, tl.reshape(v.to(y.dtype.element_ty), [BLOCK * 8]), mask=k < N * K)


@triton.jit
def _number(word, INDEX: tl.constexpr, z, s):
    """Number INDEX of eight; 0x4B000000 is 2^23 in fp32, whose mantissa counts ones."""
    return (((word >> (INDEX * 4)) & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0 - z) * s


def kind_of(tensor: Tensor, capability: int) -> str:
    """What the kernels call the tensor's numbers; "" for none in few bits."""
    kind = KINDS.get(tensor.dtype, "")
    return "bits" if kind == "fp8" and capability < HARDWARE_FP8 else kind


def pointer_of(tensor: Tensor, capability: int) -> str:
    """The Triton type of its pointer there."""
    return "*u8" if kind_of(tensor, capability) == "bits" else POINTERS[tensor.dtype]


def dequantise(
    x: Tensor, scale: Tensor, zero: Tensor | None, y: Tensor, how: tuple[str, int], capability: int,
    operands: tuple[Operand, Operand, Operand, Operand],
) -> Launch:  # fmt: skip
    """x, scale, zero and y at `operands`. how: (one, rows or groups; the group)."""
    rows, depth = x.shape
    signature = (("x", pointer_of(x, capability)), ("scale", POINTERS[scale.dtype]),
                 ("zero", POINTERS[(zero or x).dtype]), ("y", POINTERS[y.dtype]))  # fmt: skip
    if zero is None:
        signature = (*signature[:2], ("zero", pointer_of(x, capability)), signature[3])
    if x.dtype == "int4" and how[0] != "one" and not depth % 8 and not how[1] % 8:
        words = {"N": rows, "K": depth, "BLOCK": WORDS, "ZERO": zero is not None, "GROUP": how[1]}
        kernel = Kernel("dequantise.kernel:dequantise_words_kernel", signature, tuple(words.items()),
                        divisible=("x", "y") if depth % 32 == 0 else ())  # fmt: skip
        return Launch(kernel, (triton.cdiv(rows * depth // 8, WORDS), 1, 1), operands)
    block = min(BLOCK, max(16, triton.next_power_of_2(depth)))
    constants: dict[str, Any] = {"K": depth, "BLOCK": block, "KIND": kind_of(x, capability), "ZERO": zero is not None,
                                 "GROUP": how[1], "SCALE": how[0]}  # fmt: skip
    kernel = Kernel("dequantise.kernel:dequantise_kernel", signature, tuple(constants.items()),
                    divisible=("x", "y") if depth % 32 == 0 else ())  # fmt: skip
    return Launch(kernel, (rows, -(-depth // block), 1), operands)


def tactics(site: Site) -> list[Tactic]:
    """A matrix with one scale for all, for each row, or for groups of columns; [] for other shapes."""
    x, scale, *rest = site.inputs
    assert x is not None and scale is not None
    zero = rest[0] if rest else None
    if len(x.shape) != 2 or not kind_of(x, site.device.capability) or (x.dtype == "int4" and x.shape[1] % 2):
        return []
    axis, group = site.attributes.get("axis", 1) % 2, site.attributes.get("block_size", 0)
    count = 1
    for size in scale.shape:
        count *= size
    if count == 1:
        how = ("one", 0)
    elif group and axis == 1:
        how = ("groups", group) if scale.shape[1] > 1 else ("rows", 0)
    elif axis == 0 and not group and count == x.shape[0]:
        how = ("rows", 0)
    else:
        return []
    operands = (Operand("input", 0), Operand("input", 1), Operand("input", 2 if zero else 0), Operand("output", 0))
    return [Tactic("rows", (dequantise(x, scale, zero, site.outputs[0], how, site.device.capability, operands),))]
