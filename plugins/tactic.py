"""How an op runs on a GPU: kernels, launches and tactics, as plain data.

An op's `kernel.py` holds Triton functions and `tactics(site)`, which says how a node with these very shapes could run.
The builder compiles the kernels of each tactic to cubins, times them and keeps the winner; the runtime launches it. All
sizes of a launch are known when it is made (a plan has one list of launches per bucket of tokens), so it can be
captured in a CUDA graph; what varies from step to step is read from the step tensors on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..engines.dtypes import DTYPES


@dataclass(frozen=True)
class Tensor:
    """Shape and element type (`float32`, `bfloat16`, `float16`, `int32`, ..) of an operand; row-major, contiguous.

    `int4` lies as ONNX packs it, two numbers in a byte, the first in the lower half; the shape counts numbers.
    cold: it comes from memory and never from a cache (a weight, a KV pool), which is how a tactic is timed.
    """

    shape: tuple[int, ...]
    dtype: str
    cold: bool = field(default=False, compare=False)

    @property
    def num_bytes(self) -> int:
        count = prod(self.shape)
        return -(-count // 2) if self.dtype == "int4" else count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Device:
    """What tactics may depend on. capability: 90 for 9.0; cublas: cuBLASLt is at hand to propose algorithms."""

    capability: int = 90
    num_sms: int = 132
    cublas: bool = False


@dataclass(frozen=True)
class Site:
    """A node in one bucket. `inputs` has an entry per input of the op's schema, None where an optional one is absent.

    Step tensors have their bucket's sizes: T tokens, S sequences, P pages of the longest allowed context.
    """

    op: str
    attributes: Mapping[str, Any]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    device: Device = field(default_factory=Device)
    # of a node that reads the page table, None for any number (and for other nodes):
    max_query: int | None = None  # most query tokens of a sequence in this bucket; 1 in a bucket for decoding
    max_context: int | None = None  # most keys of a sequence in this bucket


@dataclass(frozen=True)
class Kernel:
    """What one cubin is compiled from.

    function: `module:name` of a Triton function, relative to `ingot.plugins` (`rms_norm.kernel:rms_norm_kernel`).
    signature: runtime arguments in order, name -> Triton type (`*bf16`, `*i32`, `i32`, `fp32`).
    constants: the function's `tl.constexpr` arguments.
    divisible: names of pointers and integers that are multiples of 16.
    """

    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gemm:
    """A matrix product by cuBLASLt, y [rows, width] = x [rows, depth] weight [width, depth]^T + bias, accumulated in
    fp32: the algorithm that it proposes in place `rank`. Its arguments are x, weight, bias (any pointer where there is
    none), y and `WORKSPACE` bytes (`plugins/cublas.py`).

    scaled: the type of y where x and weight are FP8; two arguments follow, fp32 factors of the rows of x [rows] and of
    those of the weight [width]."""

    rows: int
    width: int
    depth: int
    dtype: str
    bias: bool = False
    rank: int = 0
    scaled: str = ""


@dataclass(frozen=True)
class Operand:
    """A pointer argument. kind: `input`, `output` (index: of the op's schema; offset: bytes behind its start),
    `workspace` (index: byte offset) or `zeros` (index: byte offset), memory that every launch leaves as it finds it,
    all zeros."""

    kind: str
    index: int
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid (a product has none of its own), and its arguments in the order of the signature."""

    kernel: Kernel | Gemm
    grid: tuple[int, int, int]
    arguments: tuple[Operand | int | float, ...]


@dataclass(frozen=True)
class Tactic:
    """One way to run a node: launches in order, on `workspace` bytes that hold nothing between nodes, and on `zeros`
    bytes that hold zeros."""

    name: str
    launches: tuple[Launch, ...]
    workspace: int = 0
    zeros: int = 0


POINTERS = {
    "float32": "*fp32",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int32": "*i32",
    "int64": "*i64",
    "uint8": "*u8",
    "int8": "*i8",
    "int4": "*u8",
    "float8_e4m3fn": "*fp8e4nv",
}
