"""DequantizeLinear in torch: a weight in few bits becomes one in the activation's type (part of `onnx_ops.ONNX_OPS`).

Semantics: onnx.ai/onnx/operators/onnx__DequantizeLinear.html, opset 23: `(x - zero) * scale`, one scale for all, for
each index of `axis`, or for `block_size` neighbours along it.
"""

import torch

from .binder import Attributes, Constants, Run
from .dtypes import TORCH_DTYPES


def bind_dequantize(attributes: Attributes, constants: Constants) -> Run:
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    wanted = TORCH_DTYPES[attributes["output_dtype"]] if attributes.get("output_dtype") else None

    def spread(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if scale.dim() == 0:
            return scale
        if block:
            return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
        return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])

    def dequantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        y = x.float()
        if zero is not None:
            y = y - spread(zero, x).float()
        return (y * spread(scale, x).float()).to(wanted or scale.dtype)

    return dequantize


def unpack_int4(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """int8 numbers -8 .. 7 of two in a byte, the lower half first (ONNX's packing of INT4)."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten()[: torch.Size(shape).numel()]
    return (((both ^ 8).to(torch.int8)) - 8).reshape(shape)
