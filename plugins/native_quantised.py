"""Binds the quantised ops to their C++ kernels, as `native_binders.py` does the others.

A weight in INT4 arrives as its file has it, two numbers in a byte (uint8, [N, K / 2]), and stays so: the kernel reads
it in place. Where a node or an input is not served, the reference gets the numbers one by one.
"""

import ctypes
import math
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .binder import Attributes, Binder, Constants, Run
from .dtypes import TORCH_DTYPES
from .onnx_quantise import bind_quantize, unpack_int4
from .quantise_tokens.reference import quantise_tokens
from .quantised_linear.reference import quantised_linear

ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # simd.h's DType
INT8_ROWS = 3  # quantised_linear/kernel.cpp
FORMATS = {torch.uint8: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # quantised_linear/numbers.h
LONGEST_SUM = 65536  # products of two bytes whose sum fits 32 bits

Prototype = Callable[..., None]
P, Q, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def binders(library: ctypes.CDLL, function: Callable[..., Prototype]) -> dict[str, Binder]:
    """Op name -> binder; `function(name, *types)` finds a kernel. Raises AttributeError if the library lacks one."""
    quantise = function("ingot_quantise", P, P, P, P, F, Q, Q)
    product, in_bytes = function("ingot_quantised_linear", P, P), bool(library.ingot_multiplies_bytes())
    return {
        "QuantisedLinear": partial(_bind_quantised_linear, product, in_bytes),
        "QuantiseTokens": partial(_bind_quantise_tokens, quantise),
        "QuantizeLinear": partial(_bind_quantize_linear, quantise),
    }


def _bind_quantised_linear(
    launch: Prototype, multiplies_bytes: bool, attributes: Attributes, constants: Constants
) -> Run | None:
    _, weight, scale, zero, _, bias = constants
    y_dtype = TORCH_DTYPES.get(attributes["dtype"])
    if weight is None or scale is None or weight.dtype not in FORMATS or y_dtype not in ACTIVATIONS:
        return None
    format, packed = FORMATS[weight.dtype], weight.dtype is torch.uint8
    width, depth = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    segment, group, x_group = _segment(depth, attributes["group"], attributes["x_group"])
    if not weight.is_contiguous() or scale.dtype is not torch.float32 or not depth or (packed and segment % 2):
        return None
    if zero is not None and weight.dtype is torch.float8_e4m3fn:
        return None
    num_segments, given_zero, given_bias = -(-depth // segment), zero, bias
    scale = scale.reshape(width, -1)
    if zero is not None and zero.dtype is torch.uint8:
        zero = unpack_int4(zero, tuple(scale.shape))
    in_segments = partial(_of_segments, group=group, segment=segment, num_segments=num_segments)
    operands = (
        *(weight, in_segments(scale), None if zero is None else in_segments(zero)),
        None if bias is None else bias.float().contiguous(),
    )
    addresses = (0 if operand is None else operand.data_ptr() for operand in operands)  # of what `run` keeps alive
    start = struct.pack("4P5q", *addresses, width, depth, segment, num_segments if group else 1, format)
    structs = {code: start + struct.pack("2q", code, ACTIVATIONS[y_dtype]) for code in range(4)}
    bytes_served = multiplies_bytes and format != FORMATS[torch.float8_e4m3fn] and segment <= LONGEST_SUM
    pack = struct.Struct("3P3q").pack  # QuantisedCall

    def run(
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero: Tensor | None = None,
        x_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        if x.dim() != 2 or weight_zero is not given_zero or bias is not given_bias:
            if packed:
                weight = unpack_int4(operands[0], (width, depth))
                weight_zero = zero if weight_zero is given_zero else weight_zero
            return quantised_linear(x, weight, weight_scale, weight_zero, x_scale, bias, **attributes)
        code = ACTIVATIONS.get(x.dtype)
        if code is None:
            if x.dtype is torch.int8 and bytes_served:
                code = INT8_ROWS
            else:
                x, code = x.to(torch.bfloat16), ACTIVATIONS[torch.bfloat16]  # exact: 8 bits are
        x, rows, stride, step = x.contiguous(), x.shape[0], 0, 0
        scales = 0
        if x_scale is not None:
            if x_scale.numel() > 1 or rows == 1:
                x_scale = _of_segments(x_scale.reshape(rows, -1), x_group, segment, num_segments)
                stride, step = x_scale.shape[1], x_group > 0
            scales = x_scale.data_ptr()
        y = torch.empty((rows, width), dtype=y_dtype)
        launch(structs[code], pack(x.data_ptr(), scales, y.data_ptr(), rows, stride, step))
        return y

    return run


def _segment(depth: int, group: int, x_group: int) -> tuple[int, int, int]:
    """Columns that share all their scales, and the groups; a group of the whole row is 0."""
    group, x_group = (g if 0 < g < depth else 0 for g in (group, x_group))
    return math.gcd(group, x_group) or depth, group, x_group


def _of_segments(scale: Tensor, group: int, segment: int, num_segments: int) -> Tensor:
    """[R, G] contiguous, G = num_segments where there are groups."""
    if not group or group == segment:
        return scale.contiguous()
    return scale.repeat_interleave(group // segment, 1)[:, :num_segments].contiguous()


def _bind_quantise_tokens(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    stored, group = TORCH_DTYPES.get(attributes["dtype"]), attributes["group"]
    if stored not in (torch.int8, torch.float8_e4m3fn):
        return None
    quantise = _quantiser(launch, stored)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype not in ACTIVATIONS or x.dim() != 2 or not x.shape[1]:
            return quantise_tokens(x, **attributes)
        width = group or x.shape[1]
        scale = torch.empty((x.shape[0], -(-x.shape[1] // width)), dtype=torch.float32)
        return quantise(x, width, scale.data_ptr(), 0.0), scale

    return run


def _bind_quantize_linear(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    """Of ONNX, where one scale that is known serves for all, without an input for zero points."""
    scale, stored = constants[1], TORCH_DTYPES.get(attributes.get("output_dtype", 0))
    if scale is None or scale.numel() != 1 or scale.dtype is not torch.float32 or attributes.get("precision", 1) != 1:
        return None
    if stored not in (torch.int8, torch.float8_e4m3fn) or len(constants) > 2 or not attributes.get("saturate", 1):
        return None
    reference, quantise, number = bind_quantize(attributes, constants), _quantiser(launch, stored), float(scale)
    assert reference

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Any:
        if x.dtype not in ACTIVATIONS or x.dim() != 2 or not x.shape[1]:
            return reference(x, scale, zero)
        return quantise(x, x.shape[1], None, number)

    return run


def _quantiser(launch: Prototype, stored: torch.dtype) -> Callable[[Tensor, int, int | None, float], Tensor]:
    """x [T, K], columns of a group, where scales [T, G] are to be written or None, the scale if None -> [T, K]."""

    def quantise(x: Tensor, width: int, scales: int | None, scale: float) -> Tensor:
        x, values = x.contiguous(), torch.empty(x.shape, dtype=torch.int8)
        arguments = struct.pack("3q", ACTIVATIONS[x.dtype], stored is torch.float8_e4m3fn, width)
        launch(arguments, x.data_ptr(), values.data_ptr(), scales, scale, *x.shape)
        return values.view(stored)

    return quantise
