"""QuantizeLinear and DequantizeLinear in torch (part of `onnx_ops.ONNX_OPS`).

Semantics: onnx.ai/onnx/operators/onnx__DequantizeLinear.html and onnx__QuantizeLinear.html, opset 23:
`(x - zero) * scale` and `x / scale + zero`, one scale for all, for each index of `axis`, or for `block_size` neighbours
along it.
"""

import torch

from .binder import Attributes, Constants, Run
from .dtypes import TORCH_DTYPES
from .quantise_tokens.reference import LIMITS, round_to


def bind_dequantize(attributes: Attributes, constants: Constants) -> Run:
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    wanted = TORCH_DTYPES[attributes["output_dtype"]] if attributes.get("output_dtype") else None

    def dequantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        y = x.float()
        if zero is not None:
            y = y - _spread(zero, x, axis, block).float()
        return (y * _spread(scale, x, axis, block).float()).to(wanted or scale.dtype)

    return dequantize


def bind_quantize(attributes: Attributes, constants: Constants) -> Run | None:
    """Divided in fp32; the zero point, if any, is added to what was rounded. INT8 and FLOAT8E4M3FN only."""
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    wanted = TORCH_DTYPES.get(attributes.get("output_dtype", 0))
    if wanted not in LIMITS or not attributes.get("saturate", 1) or attributes.get("precision", 1) != 1:
        return None

    def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        y = x.float() / _spread(scale, x, axis, block).float()
        if zero is not None:
            y = y.round() + _spread(zero, x, axis, block).float()
        return round_to(y, wanted)

    return quantize


def _spread(scale: torch.Tensor, x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """A scale for each number of x."""
    if scale.dim() == 0:
        return scale
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def unpack_int4(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """int8 numbers -8 .. 7 of two in a byte, the lower half first (ONNX's packing of INT4)."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten()[: torch.Size(shape).numel()]
    return (((both ^ 8).to(torch.int8)) - 8).reshape(shape)
