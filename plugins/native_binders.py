"""Binds graph nodes to the C++ kernels: what is constant becomes a C struct once, a step only passes pointers.

A launch costs about 2 us of Python, most of it the allocation of the output. The structs mirror those of the
`kernel.cpp` beside each op. A node or an input that a kernel does not serve (another dtype, an index type, too many
rows) goes to the op's reference, so a binder never changes what an op means, only how fast it is. Structs are `bytes`,
which ctypes passes by address; the closure keeps them alive, and the weights whose addresses they hold.
"""

import ctypes
import struct
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import native_quantised
from .binder import Attributes, Binder, Constants, Run
from .dtypes import TORCH_DTYPES
from .few_shapes import in_few_shapes
from .gated_activation.reference import gated_activation
from .linear.reference import linear
from .native_attention import DTYPES, bind_paged_attention
from .rms_norm.reference import rms_norm
from .rope.reference import rope
from .rotary_cos_sin.reference import rotary_cos_sin

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

# Rows up to which the kernel beats F.linear.
MAX_ROWS = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 48}

P, Q, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Prototype = Callable[..., None]


def binders(library: ctypes.CDLL) -> dict[str, Binder]:
    """Op name -> binder over the kernels of `library`. Raises AttributeError if the library lacks one."""

    def function(name: str, *types: type) -> Prototype:
        prototype = getattr(library, name)
        prototype.argtypes, prototype.restype = types, None
        return prototype

    return {
        "Linear": partial(_bind_linear, function("ingot_linear", P, P, P, Q)),
        "RMSNorm": partial(_bind_rms_norm, function("ingot_rms_norm", P, P, P, P, P, Q)),
        "Rope": partial(_bind_rope, function("ingot_rope", P, P, P, P, Q, Q, Q)),
        "RotaryCosSin": partial(_bind_rotary_cos_sin, function("ingot_rotary_cos_sin", P, Q, F, Q, P, P, Q)),
        "GatedActivation": partial(_bind_gated_activation, function("ingot_gated_activation", Q, Q, P, P, Q, Q)),
        "PagedAttention": partial(bind_paged_attention, function("ingot_paged_attention", P, P)),
        **native_quantised.binders(library, function),
    }


def _bind_linear(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    _, weight, bias = constants
    if weight is None or weight.dtype not in DTYPES or not weight.is_contiguous():
        return None
    if bias is not None and (bias.dtype is not weight.dtype or not bias.is_contiguous()):
        return None
    dtype, (width, depth) = weight.dtype, weight.shape
    bias_address = 0 if bias is None else bias.data_ptr()
    arguments = struct.pack("PPqqq", weight.data_ptr(), bias_address, width, depth, DTYPES[dtype])
    max_rows, bound = MAX_ROWS[dtype], bias
    many_rows = _onednn_linear if dtype is torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise") else linear

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        if x.dtype is not dtype or bias is not bound or x.dim() != 2:
            return linear(x, weight, bias)
        if rows > max_rows:
            return many_rows(x, weight, bias)
        x = x.contiguous()
        y = torch.empty((rows, width), dtype=dtype)
        launch(arguments, x.data_ptr(), y.data_ptr(), rows)
        return y

    return run


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear through oneDNN, as torch itself does for 16-bit types. In fp32 it takes MKL, whose products on AMD CPUs
    reach three quarters of the speed."""
    return in_few_shapes(lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""), x)


def _bind_rms_norm(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    weight = constants[1]
    if weight is None or weight.dtype not in DTYPES or not weight.is_contiguous():
        return None
    dtype, size = weight.dtype, weight.shape[0]
    epsilon, offset = attributes["epsilon"], attributes["weight_offset"]
    fp32_multiply = int(bool(offset or attributes["fp32_multiply"]))
    structs: dict[int, bytes] = {}  # row width -> struct

    def run(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if x.dtype is not dtype or x.dim() != 2 or (residual is not None and residual.dtype is not dtype):
            return rms_norm(x, weight, residual, **attributes)
        rows, width = x.shape
        arguments = structs.get(width)
        if arguments is None:
            chunks = width // size
            arguments = struct.pack(
                "Pqqqqff", weight.data_ptr(), size, chunks, fp32_multiply, DTYPES[dtype], epsilon, offset
            )
            structs[width] = arguments
        x = x.contiguous()
        y = torch.empty((rows, width), dtype=dtype)
        if residual is None:
            launch(arguments, x.data_ptr(), None, y.data_ptr(), None, rows)
            return y
        residual = residual.contiguous()
        total = torch.empty((rows, width), dtype=dtype)
        launch(arguments, x.data_ptr(), residual.data_ptr(), y.data_ptr(), total.data_ptr(), rows)
        return y, total

    return run


def _bind_rope(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    shape = (attributes["num_heads"], attributes["head_dim"], attributes["interleaved"], attributes["rotary_offset"])
    structs = {  # a 16-bit table with fp32 activations is left to the reference
        (dtype, table): struct.pack("6q", *shape, DTYPES[dtype], DTYPES[table])
        for dtype in DTYPES
        for table in DTYPES
        if table in (dtype, torch.float32)
    }

    def run(x: Tensor, cos_sin: Tensor) -> Tensor:
        arguments = structs.get((x.dtype, cos_sin.dtype))
        if arguments is None or x.dim() != 2:
            return rope(x, cos_sin, **attributes)
        x, cos_sin = x.contiguous(), cos_sin.contiguous()
        rows, width = x.shape
        y = torch.empty((rows, width), dtype=x.dtype)
        launch(arguments, x.data_ptr(), cos_sin.data_ptr(), y.data_ptr(), rows, width, cos_sin.shape[1])
        return y

    return run


def _bind_rotary_cos_sin(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    inv_freq, dtype = constants[1], TORCH_DTYPES.get(attributes["dtype"])
    if inv_freq is None or inv_freq.dtype is not torch.float32 or not inv_freq.is_contiguous() or dtype not in DTYPES:
        return None
    half, scaling = inv_freq.shape[0], attributes["attention_scaling"]
    address, code = inv_freq.data_ptr(), DTYPES[dtype]

    def run(positions: Tensor, inv_freq: Tensor) -> Tensor:
        if positions.dtype is not torch.int32 or positions.dim() != 1:
            return rotary_cos_sin(positions, inv_freq, **attributes)
        positions, rows = positions.contiguous(), positions.shape[0]
        y = torch.empty((rows, 2 * half), dtype=dtype)
        launch(address, half, scaling, code, positions.data_ptr(), y.data_ptr(), rows)
        return y

    return run


def _bind_gated_activation(launch: Prototype, attributes: Attributes, constants: Constants) -> Run | None:
    activation = ACTIVATIONS.get(attributes["activation"])
    if activation is None:
        return None

    def run(x: Tensor) -> Tensor:
        dtype = DTYPES.get(x.dtype)
        if dtype is None or x.dim() != 2:
            return gated_activation(x, **attributes)
        x = x.contiguous()
        rows, width = x.shape[0], x.shape[1] // 2
        y = torch.empty((rows, width), dtype=x.dtype)
        launch(activation, dtype, x.data_ptr(), y.data_ptr(), rows, width)
        return y

    return run
