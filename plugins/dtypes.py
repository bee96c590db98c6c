"""Data types: ONNX numbers -> torch, and the torch copy of a tensor held by onnx_ir.

numpy borrows bfloat16 and the 8-bit floats from ml_dtypes, which torch does not read, so they cross as raw bits.
"""

from typing import Any

import numpy as np
import torch

from ..engines.dtypes import DTYPES, from_numpy

TORCH_DTYPES: dict[int, torch.dtype] = {int(dtype.onnx): dtype.torch for dtype in DTYPES.values()}


def to_torch(tensor: Any) -> torch.Tensor:
    """The torch tensor of an `onnx_ir` tensor (or of an array): its own copy, same shape and dtype."""
    array = np.array(tensor.numpy() if hasattr(tensor, "numpy") else tensor, order="C")
    if array.dtype.name == "int4":  # which torch does not have
        array = array.astype(np.int8)
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(from_numpy(array.dtype).torch)
