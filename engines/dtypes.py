"""Element types, one row each: ingot's name, and what numpy, torch, ONNX and safetensors call the same thing.

torch and onnx_ir are imported when asked for, so that the manifest and the command line stay quick.
Invariant: `DTYPES[d.name] is d`, and names are torch's, which are also numpy's and ONNX's in lower case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch


@dataclass(frozen=True)
class DType:
    """One element type."""

    name: str
    safetensors: str
    itemsize: int  # bytes

    @property
    def floating(self) -> bool:
        return "float" in self.name

    @property
    def numpy(self) -> np.dtype:
        import ml_dtypes
        import numpy as np

        return np.dtype(getattr(ml_dtypes, self.name, self.name))

    @property
    def torch(self) -> torch.dtype:
        import torch

        return getattr(torch, self.name)

    @property
    def onnx(self) -> ir.DataType:
        import onnx_ir as ir

        # the rest differ in case and in FLOAT8E4M3FN's spelling
        special = {"float32": "FLOAT", "float64": "DOUBLE", "float8_e8m0fnu": "FLOAT8E8M0"}
        return ir.DataType[special.get(self.name, self.name.upper().replace("FLOAT8_", "FLOAT8"))]


DTYPES = {
    d.name: d
    for d in (
        DType("float32", "F32", 4),
        DType("bfloat16", "BF16", 2),
        DType("float16", "F16", 2),
        DType("float64", "F64", 8),
        DType("float8_e4m3fn", "F8_E4M3", 1),
        DType("float8_e5m2", "F8_E5M2", 1),
        DType("float8_e8m0fnu", "F8_E8M0", 1),  # powers of two: scales
        DType("int64", "I64", 8),
        DType("int32", "I32", 4),
        DType("int16", "I16", 2),
        DType("int8", "I8", 1),
        DType("uint8", "U8", 1),
        DType("bool", "BOOL", 1),
    )
}

ACTIVATION_DTYPES = ("float32", "bfloat16", "float16")  # what --dtype accepts

_BY_SAFETENSORS = {d.safetensors: d for d in DTYPES.values()}


def from_safetensors(name: str) -> DType:
    """The row of a safetensors type such as `BF16`; KeyError if ingot does not know it."""
    return _BY_SAFETENSORS[name]


def from_numpy(dtype: np.dtype) -> DType:
    """The row of a numpy (or ml_dtypes) dtype; KeyError if ingot does not know it."""
    return DTYPES[dtype.name]
