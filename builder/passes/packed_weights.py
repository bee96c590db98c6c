"""Weights made of parts of the checkpoint's own, put together only when somebody asks for the numbers.

A packed weight is a concatenation of parts; a part is some rows of one stored tensor (transposed first, for the
[in, out] layout of GPT-2). Packing packed weights composes the row numbers, so there is always one step from the
stored tensors to the final one, and rows that come out in stored order are the stored tensor itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import onnx_ir as ir

from ...engines.errors import BuildError
from .graph import dims, size

PARTS = "ingot.parts"  # key in `Value.meta`: tuple[Part, ...] of a packed weight
# keys in the `meta` of a tensor: what a weight is in a checkpoint that is quantised already, and what must agree for
# two of them to be packed
STORED, KIND = "ingot.stored", "ingot.kind"
WORKING_NUMBER = "#"  # before the number that keeps names apart while passes still have several packings of a weight


@dataclass(frozen=True)
class Part:
    """Rows of a stored tensor: `source[rows]`, or `source.T[rows]`. Without a source: that many rows of zeros."""

    source: ir.Value | None
    rows: np.ndarray  # [n] int64
    transposed: bool = False

    def numpy(self, tail: tuple[int, ...], dtype: ir.DataType) -> np.ndarray:
        """The rows, [n, *tail]. Raises BuildError where the source has no data yet."""
        if self.source is None:
            return np.zeros((len(self.rows), *tail), dtype.numpy())
        if self.source.const_value is None:
            name = self.source.name
            raise BuildError(f"the weight '{name}' has no data; bind the checkpoint's weights to the graph first")
        stored = self.source.const_value.numpy()
        stored = stored.T if self.transposed else stored
        whole = len(self.rows) == len(stored) and bool((np.diff(self.rows) == 1).all())
        return np.ascontiguousarray(stored) if whole else stored[self.rows]


def parts_of(weight: ir.Value) -> tuple[Part, ...]:
    """What a weight is made of; one part, itself, for a stored one."""
    return weight.meta.get(PARTS) or (Part(weight, np.arange(size(weight, 0))),)


def same_kind(weights: Sequence[ir.Value]) -> bool:
    """Whether the checkpoint has all of these in the same numbers, so that they can lie in one weight."""
    sources = [part.source for weight in weights for part in parts_of(weight)]
    return len({_meta(source, KIND) for source in sources}) < 2


def stored_as(part: Part) -> Any:
    """What a part is in a checkpoint that is quantised already; None: numbers in the activation dtype."""
    return _meta(part.source, STORED)


def _meta(source: ir.Value | None, key: str) -> Any:
    tensor = None if source is None else source.const_value
    return None if tensor is None else tensor.meta.get(key)


def zeros(length: int) -> tuple[Part, ...]:
    """The parts of a bias that is not there."""
    return (Part(None, np.zeros(length, np.int64)),)


def transposed(weight: ir.Value) -> tuple[Part, ...]:
    """The parts of the transpose of a stored [K, N] weight."""
    return (Part(weight, np.arange(size(weight, 1)), transposed=True),)


def take_rows(parts: Sequence[Part], rows: np.ndarray) -> tuple[Part, ...]:
    """The parts of `concatenation[rows]`, runs of the same source joined."""
    owner = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    stored = np.concatenate([part.rows for part in parts])
    cuts = np.flatnonzero(np.diff(owner[rows])) + 1
    runs = np.split(np.asarray(rows), cuts)
    return tuple(Part(parts[owner[run[0]]].source, stored[run], parts[owner[run[0]]].transposed) for run in runs)


def pack(graph: ir.Graph, parts: Sequence[Part], like: ir.Value) -> ir.Value:
    """The initialiser that concatenates `parts` along axis 0; the stored tensor itself where that is all it is.

    `like` gives the dtype and, for a part without source, the other sizes. The name is made of the sources' names.
    """
    parts = _joined(parts)
    first = parts[0]
    if len(parts) == 1 and first.source is not None and not first.transposed and _is_whole(first):
        if first.source.name not in graph.initializers:  # nobody read it as it is for a while
            graph.register_initializer(first.source)
        return first.source
    length = sum(len(part.rows) for part in parts)
    tail = _tail(parts, like)
    dtype = like.dtype
    assert dtype is not None
    value = ir.Value(name=_unique(graph, _name(parts)), shape=ir.Shape((length, *tail)), type=like.type)

    def assemble() -> ir.Tensor:
        if len(parts) == 1:
            return ir.Tensor(first.numpy(tail, dtype), dtype=dtype, name=value.name)
        whole, start = np.empty((length, *tail), dtype.numpy()), 0
        for part in parts:  # one by one, so that no two stored tensors are in memory
            end = start + len(part.rows)
            whole[start:end] = part.numpy(tail, dtype)
            start = end
        return ir.Tensor(whole, dtype=dtype, name=value.name)

    value.const_value = ir.LazyTensor(assemble, dtype, ir.Shape((length, *tail)), name=value.name)
    value.meta[PARTS] = tuple(parts)
    graph.register_initializer(value)
    return value


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of the same source made one part."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.source is part.source and last.transposed == part.transposed:
            joined[-1] = Part(part.source, np.concatenate([last.rows, part.rows]), part.transposed)
        else:
            joined.append(part)
    return joined


def _is_whole(part: Part) -> bool:
    assert part.source is not None
    return np.array_equal(part.rows, np.arange(size(part.source, 0)))


def _tail(parts: Sequence[Part], like: ir.Value) -> tuple[int, ...]:
    """Sizes of all axes but the first."""
    for part in parts:
        if part.source is not None:
            axes = range(1) if part.transposed else range(1, len(dims(part.source)))
            return tuple(size(part.source, axis) for axis in axes)
    return tuple(size(like, axis) for axis in range(1, len(dims(like))))


def _name(parts: Sequence[Part]) -> str:
    """`a.q.weight`, `a.k.weight` -> `a.q+k.weight`; parts of one tensor keep its name."""
    names = list(dict.fromkeys(part.source.name or "" for part in parts if part.source is not None))
    if len(names) < 2:
        return (names or ["zeros"])[0]
    head = commonprefix(names).rpartition(".")[0]
    tails = [name.removeprefix(f"{head}.") for name in names]
    last = {tail.rpartition(".")[2] for tail in tails}
    middles = [re.sub(r"\.[^.]*$", "", tail) for tail in tails]
    joined = "+".join(middles) + "." + last.pop() if len(last) == 1 else "+".join(tails)
    return f"{head}.{joined}" if head else joined


def _unique(graph: ir.Graph, name: str) -> str:
    taken, number, unique = graph.initializers, 1, name
    while unique in taken:
        number += 1
        unique = f"{name}{WORKING_NUMBER}{number}"
    return unique
