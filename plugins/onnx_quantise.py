"""DequantizeLinear and QuantizeLinear in torch: numbers in few bits, and activations (part of `onnx_ops.ONNX_OPS`).

Semantics: onnx.ai/onnx/operators/onnx__DequantizeLinear.html and onnx__QuantizeLinear.html, opset 23:
`(x - zero) * scale` and `saturate(round(x / scale) + zero)`, ties to even; one scale for all, for each index of `axis`,
or for `block_size` neighbours along it.
"""

from functools import partial

import torch

from .binder import Attributes, Constants, Run
from .dtypes import TORCH_DTYPES


def bind_dequantize(attributes: Attributes, constants: Constants) -> Run:
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    wanted = TORCH_DTYPES[attributes["output_dtype"]] if attributes.get("output_dtype") else None

    spread = partial(_spread, axis=axis, block=block)

    def dequantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        y = x.float()
        if zero is not None:
            y = y - spread(zero, x).float()
        return (y * spread(scale, x).float()).to(wanted or scale.dtype)

    return dequantize


LIMITS = {torch.int8: (-128.0, 127.0), torch.uint8: (0.0, 255.0), torch.float8_e4m3fn: (-448.0, 448.0)}


def bind_quantize(attributes: Attributes, constants: Constants) -> Run | None:
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    output, precision = attributes.get("output_dtype", 0), attributes.get("precision", 0)
    zero = constants[2] if len(constants) > 2 else None
    stored = TORCH_DTYPES.get(output) if output else torch.uint8 if zero is None else zero.dtype
    if not attributes.get("saturate", 1) or stored not in LIMITS:
        return None
    spread = partial(_spread, axis=axis, block=block)

    def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        dtype = zero.dtype if zero is not None else stored
        divided = TORCH_DTYPES[precision] if precision else scale.dtype
        y = (x.to(divided) / spread(scale, x).to(divided)).float()
        if not dtype.is_floating_point:
            y = y.round()
        if zero is not None:
            y = y + spread(zero, x).float()
        return y.clamp(*LIMITS[dtype]).to(dtype)  # first: torch makes NaN of what is beyond 448

    return quantize


def _spread(scale: torch.Tensor, x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Scales or zero points so that they meet the elements of x."""
    if scale.dim() == 0:
        return scale
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def unpack_int4(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """int8 numbers -8 .. 7 of two in a byte, the lower half first (ONNX's packing of INT4)."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten()[: torch.Size(shape).numel()]
    return (((both ^ 8).to(torch.int8)) - 8).reshape(shape)
