"""Matrix products of many rows by cuBLASLt (nvmath-python): the builder times the algorithms it proposes, the engine
keeps the one chosen, as the 64 bytes that cuBLASLt describes it by.

y [M, N] = x [M, K] weight [N, K]^T. cuBLASLt counts by columns, so it is asked for y^T = weight x^T: the row-major
arrays are its transposes. Accumulated in fp32, products of FP8 with the 14 bits or so that tensor cores of capability
9.0 keep between additions (over 14,336 columns that is 0.3% of the result, a tenth of what rounding to FP8 costs; other
servers of FP8 do the same). Every description is made before a stream is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from ..engines import plan
from ..engines.errors import BuildError, EngineError
from ..engines.extras import pip_install
from .gpu import Address
from .tactic import Gemm

WORKSPACE = 32 << 20  # bytes; NVIDIA recommends it for compute capability 9.0
MOST = 8  # algorithms that are asked for
ANY_ADDRESS = 256  # not null: what is looked for is an algorithm that reads factors


class Product:
    """A `Gemm` by the algorithm of this description, ready to be launched on the current context's device."""

    def __init__(self, gemm: Gemm, description: bytes):
        self._library, self._handle = _library()
        self._descriptor, *self._layouts = _describe(gemm)
        self._algorithm = np.frombuffer(description, np.uint8).copy()
        self._factors = np.array([1, 0], np.float32)
        self._bias, self._scaled = gemm.bias, gemm.scaled

    def launch(
        self, grid: tuple[int, int, int], stream: int, arguments: Sequence[int | float | Address], *, apart: bool = True
    ) -> None:
        """Enqueues the product; arguments are x, weight, bias (any pointer where there is none), y, workspace and, of a
        scaled one, the factors of x and of the weight.

        It always starts when all before it is done.
        """
        x, weight, bias, y, workspace, *factors = (a.value or 0 if isinstance(a, Address) else 0 for a in arguments)
        if self._bias:
            _set(self._descriptor, "BIAS_POINTER", np.uint64(bias))
        if self._scaled:
            _set(self._descriptor, "B_SCALE_POINTER", np.uint64(factors[0]))
            _set(self._descriptor, "A_SCALE_POINTER", np.uint64(factors[1]))
        weights, rows, result = self._layouts
        one, zero = self._factors.ctypes.data, self._factors[1:].ctypes.data
        self._library.matmul(
            self._handle, self._descriptor, one, weight, weights, x, rows, zero, y, result, y, result,
            self._algorithm.ctypes.data, workspace, WORKSPACE, stream,
        )  # fmt: skip


@cache
def load_product(gemm: plan.Gemm) -> Product:
    """The product of a plan; one that another version of cuBLASLt chose is run by what this one proposes first.

    Raises EngineError: the library is missing, or knows no way.
    """
    same = Gemm(gemm.rows, gemm.width, gemm.depth, gemm.dtype, gemm.bias, scaled=gemm.scaled)
    if gemm.version == version():
        return Product(same, bytes.fromhex(gemm.algorithm))
    found = algorithms(same, 1)
    if not found:
        raise EngineError(
            f"cuBLASLt {version()} has no way to run {same}, version {gemm.version} had; build the engine again."
        )
    return Product(same, found[0])


def choose(gemm: Gemm) -> plan.Gemm:
    """The algorithm in place `gemm.rank` of those proposed. Raises BuildError: there are fewer."""
    found = algorithms(replace(gemm, rank=0), MOST)
    if gemm.rank >= len(found):
        raise BuildError(f"cuBLASLt proposes {len(found)} algorithms for {gemm}.")
    fields = gemm.rows, gemm.width, gemm.depth, gemm.dtype, gemm.bias
    return plan.Gemm(*fields, found[gemm.rank].hex(), version(), gemm.scaled)


@cache
def algorithms(gemm: Gemm, most: int) -> list[bytes]:
    """Descriptions of at most `most` algorithms for a product, likeliest first; needs a GPU, its context current."""
    library, handle = _library()
    descriptor, weights, rows, result = _describe(gemm)
    preference = library.matmul_preference_create()
    limit = np.uint64(WORKSPACE)
    buffer = np.array(limit)
    name = library.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
    library.matmul_preference_set_attribute(preference, name, buffer.ctypes.data, buffer.nbytes)
    found = np.zeros(most, library.matmul_heuristic_result_dtype)
    count = np.zeros(1, np.int32)
    try:
        library.matmul_algo_get_heuristic(
            handle, descriptor, weights, rows, result, result, preference, most, found.ctypes.data, count.ctypes.data
        )
    except library.cuBLASLtError:  # it knows none
        return []
    finally:
        library.matmul_preference_destroy(preference)
    return [entry["algo"].tobytes() for entry in found[: count[0]] if entry["state"] == 0]


def why_missing() -> str:
    """Why there is no cuBLASLt, "" if there is."""
    try:
        _library()
    except EngineError as error:
        return str(error)
    return ""


def version() -> int:
    """Version of the library, as it counts."""
    return _library()[0].get_version()


@cache
def _library() -> tuple[Any, int]:
    """(cuBLASLt's bindings, a handle)."""
    try:
        from nvmath.bindings import cublasLt
    except ImportError as error:
        raise EngineError(
            f"large products run through nvmath-python ({error}); install it with {pip_install('cuda')}."
        ) from None
    try:
        return cublasLt, cublasLt.create()
    except Exception as error:  # the library is missing, or does not start on this GPU
        raise EngineError(
            f"cuBLASLt does not start ({' '.join(str(error).split())}); install it with {pip_install('cuda')}."
        ) from None


def _describe(gemm: Gemm) -> tuple[int, int, int, int]:
    """(operation, layout of the weight, of x, of y) as cuBLASLt's descriptors, which stay for the process."""
    from nvmath import CudaDataType
    from nvmath.bindings.cublas import ComputeType

    library, _ = _library()
    kinds = {"float32": CudaDataType.CUDA_R_32F, "float16": CudaDataType.CUDA_R_16F,
             "bfloat16": CudaDataType.CUDA_R_16BF, "float8_e4m3fn": CudaDataType.CUDA_R_8F_E4M3}  # fmt: skip
    kind = kinds[gemm.dtype]
    descriptor = library.matmul_desc_create(ComputeType.COMPUTE_32F, CudaDataType.CUDA_R_32F)
    _set(descriptor, "TRANSA", np.int32(1))
    if gemm.bias:
        _set(descriptor, "EPILOGUE", np.int32(library.Epilogue.BIAS))
    if gemm.scaled:  # a factor for each row of either; the pointers are set with each launch
        for operand in "AB":
            _set(descriptor, f"{operand}_SCALE_MODE", np.int32(library.MatmulMatrixScale.OUTER_VEC_32F))
            _set(descriptor, f"{operand}_SCALE_POINTER", np.uint64(ANY_ADDRESS))
    if gemm.dtype.startswith("float8"):  # partial sums stay in the tensor cores: a fifth faster, see the module
        _set(descriptor, "FAST_ACCUM", np.int8(1))
    weights = library.matrix_layout_create(kind, gemm.depth, gemm.width, gemm.depth)
    rows = library.matrix_layout_create(kind, gemm.depth, gemm.rows, gemm.depth)
    result = library.matrix_layout_create(kinds[gemm.scaled or gemm.dtype], gemm.width, gemm.rows, gemm.width)
    return descriptor, weights, rows, result


def _set(descriptor: int, name: str, value: np.generic) -> None:
    library, _ = _library()
    buffer = np.array(value)
    attribute = library.MatmulDescAttribute[name]
    library.matmul_desc_set_attribute(descriptor, attribute, buffer.ctypes.data, buffer.nbytes)
