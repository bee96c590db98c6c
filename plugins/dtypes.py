"""Data types: ONNX numbers <-> torch, and the torch view of a tensor held by onnx_ir.

numpy has no bfloat16 of its own (ml_dtypes lends one that torch does not read), so such arrays cross as raw bits.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

TORCH_DTYPES: dict[int, torch.dtype] = {
    int(ir.DataType.FLOAT): torch.float32,
    int(ir.DataType.FLOAT16): torch.float16,
    int(ir.DataType.BFLOAT16): torch.bfloat16,
    int(ir.DataType.DOUBLE): torch.float64,
    int(ir.DataType.INT8): torch.int8,
    int(ir.DataType.UINT8): torch.uint8,
    int(ir.DataType.INT16): torch.int16,
    int(ir.DataType.INT32): torch.int32,
    int(ir.DataType.INT64): torch.int64,
    int(ir.DataType.BOOL): torch.bool,
}
ONNX_DTYPES: dict[torch.dtype, int] = {dtype: number for number, dtype in TORCH_DTYPES.items()}


def to_torch(tensor: Any) -> torch.Tensor:
    """The torch tensor of an `onnx_ir` tensor (or of an array): its own copy, same shape and dtype."""
    array = np.array(tensor.numpy() if hasattr(tensor, "numpy") else tensor, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
