"""`weights.safetensors` and `model.onnx`: the weights stream to disk one at a time, and the graph points into them.

The file is plain safetensors (any tool reads it), with the data at a 4 KiB boundary and the tensors that would break
64-byte alignment last, so that a memory map of it can be handed to vector kernels as it is.
Invariant: at most one weight is in memory while writing, and none after `load_graph`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .dtypes import DTYPES, DType, from_numpy

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

WEIGHTS_FILE = "weights.safetensors"
GRAPH_FILE = "model.onnx"
_DATA_ALIGNMENT = 4096
_TENSOR_ALIGNMENT = 64


@dataclass(frozen=True)
class Weight:
    """One tensor to be written; `load()` gives its values when their turn comes, and nothing keeps them."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def write_weights(
    path: Path,
    weights: Iterable[Weight],
    progress: Callable[[int, int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, int]]:
    """Write the weights and return name -> (offset, length) in bytes from the start of the file.

    `progress(done, total)` is called in bytes after each tensor.
    Raises ValueError if a name comes twice or a loaded array is not of the declared dtype and shape.
    """
    ordered = sorted(weights, key=lambda w: w.nbytes % _TENSOR_ALIGNMENT != 0)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for w in ordered:
        if w.name in header:
            raise ValueError(f"two weights are called {w.name}")
        header[w.name] = {"dtype": w.dtype.safetensors, "shape": w.shape, "data_offsets": [end, end + w.nbytes]}
        end += w.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _DATA_ALIGNMENT)
    start, places = len(text) + 8, {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for w in ordered:
            array = w.load()
            if array.shape != w.shape or from_numpy(array.dtype) is not w.dtype:
                raise ValueError(f"{w.name} is {array.dtype} {array.shape}, declared {w.dtype.name} {w.shape}")
            places[w.name] = (file.tell(), w.nbytes)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array
            if progress:
                progress(file.tell() - start, end)
    return places


def of_tensor(name: str, tensor: torch.Tensor) -> Weight:
    """A torch tensor of the host to be written."""
    import torch

    dtype = next(dtype for dtype in DTYPES.values() if dtype.torch == tensor.dtype)
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return Weight(name, dtype, tuple(tensor.shape), lambda: raw.numpy().view(dtype.numpy).reshape(tensor.shape))


def declared_weights(model: ir.Model) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """Element type and shape of each weight as the file has it, from the graph alone: the file is not needed."""
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    weights = [_weight(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    return {weight.name: (weight.dtype, weight.shape) for weight in weights}


def random_weights(model: ir.Model) -> dict[str, torch.Tensor]:
    """Small random numbers for every weight of the graph, zeros for integers, in place of `open_weights`."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype.torch)
        if dtype.floating
        else torch.zeros(shape, dtype=dtype.torch)
        for name, (dtype, shape) in declared_weights(model).items()
    }


def open_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of an engine as tensors over one memory map: pages come from disk when they are first read."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def save_graph(model: ir.Model, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Write `weights.safetensors` from the graph's initialisers and `model.onnx` that points into it.

    The model is left as it was. Initialisers that nothing reads are dropped by the caller, not here.
    """
    import onnx_ir as ir

    initialisers = {name: value.const_value for name, value in model.graph.initializers.items()}
    missing = [name for name, tensor in initialisers.items() if tensor is None]
    if missing:
        raise ValueError(f"the initialisers {missing} have no values")
    weights = [_weight(name, tensor) for name, tensor in initialisers.items() if tensor is not None]
    places = write_weights(folder / WEIGHTS_FILE, weights, progress)
    try:
        for weight in weights:
            offset, length = places[weight.name]
            tensor = initialisers[weight.name]
            assert tensor is not None
            model.graph.initializers[weight.name].const_value = ir.ExternalTensor(
                WEIGHTS_FILE, offset, length, tensor.dtype, shape=ir.Shape(tuple(tensor.shape.numpy())),
                name=weight.name, base_dir=folder,
            )  # fmt: skip
        ir.save(model, folder / GRAPH_FILE)
    finally:
        for name, tensor in initialisers.items():
            model.graph.initializers[name].const_value = tensor


def load_graph(folder: Path) -> ir.Model:
    """The engine's graph; its initialisers are external tensors, read only when asked for."""
    import onnx_ir as ir

    return ir.load(folder / GRAPH_FILE)


def save_lowered(model: ir.Model, folder: Path) -> None:
    """Write `model.onnx` of a target's `folder` in the engine: made from `load_graph`'s, on the same weights."""
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            raise ValueError(f"the initialiser {name} is not in the engine's weights")
        value.const_value = ir.ExternalTensor(
            f"../{WEIGHTS_FILE}", tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name,
            base_dir=folder,
        )  # fmt: skip
    folder.mkdir(exist_ok=True)
    ir.save(model, folder / GRAPH_FILE)


def _weight(name: str, tensor: ir.TensorProtocol) -> Weight:
    """INT4 lies in the file as ONNX packs it, two numbers in a byte, the first in the lower half: [.., K / 2] uint8, or
    in one dimension where K is odd, since a byte is then shared by two rows."""
    import onnx_ir as ir

    if tensor.dtype == ir.DataType.INT4:
        *rows, columns = tensor.shape.numpy()
        packed = (*rows, columns // 2) if columns % 2 == 0 else ((math.prod(rows) * columns + 1) // 2,)
        return Weight(name, DTYPES["uint8"], packed, lambda: np.frombuffer(tensor.tobytes(), np.uint8).reshape(packed))
    dtype = next(d for d in DTYPES.values() if d.onnx == tensor.dtype)
    return Weight(name, dtype, tuple(tensor.shape.numpy()), tensor.numpy)
