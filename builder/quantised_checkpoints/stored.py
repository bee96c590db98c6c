"""A Linear whose weight a checkpoint stores in few bits, and the tensors that it is read from.

Nothing is rounded anew: values, scales and zero points are the stored ones, in the forms of `calibration.formats`, read
each time they are asked for. Invariant: making a `StoredModule` reads no weight; scalars and column orders at most.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...calibration.formats import Format, Quantised
from ...engines.errors import BuildError

if TYPE_CHECKING:
    from ..checkpoint import StoredTensor

Read = Callable[[], Tensor]
FLOATS = "float32", "bfloat16", "float16"


@dataclass(frozen=True, eq=False)
class StoredModule:
    """One matrix [N, K], in the terms of `Quantised`: `(values - zero) * scale`, column i of it being `order[i]`."""

    name: str  # of the module in the checkpoint
    shape: tuple[int, int]
    format: Format
    values: Read  # [N, K] int8 or float8_e4m3fn
    scale: Read  # format.scale_shape, float32
    zero: Read | None = None  # the same shape, int8
    activation: Format | None = None  # how what the product reads is quantised
    input_scale: float | None = None  # of a static activation
    order: Tensor | None = None  # [K] int64; None: columns lie in their own order

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for modules whose rows may lie in one weight: scales are kept for each row, the rest must agree."""
        order = None if self.order is None else hashlib.sha256(self.order.numpy().tobytes()).hexdigest()
        return self.format.dtype, self.format.group, self.format.symmetric, self.activation, self.input_scale, order

    def weight(self) -> Tensor:
        """What the numbers stand for, [N, K] float32, columns in their own order."""
        zero = None if self.zero is None else self.zero()
        weight = Quantised(self.format, self.values(), self.scale(), zero).dequantise()
        if self.order is None:
            return weight
        natural = torch.empty_like(weight)
        natural[:, self.order] = weight
        return natural

    def spelt(self) -> str:
        """In a few words: `int4 in groups of 128, zero points`."""
        words = _spelt(self.format) + (", act-order" if self.order is not None else "")
        if self.activation is None:
            return words
        dynamic = "for each token" if self.activation.rows else "one scale"
        return f"{words}; activations {_spelt(self.activation)}, {dynamic}"


def _spelt(form: Format) -> str:
    shape = f"{form.rows} x {form.group}" if form.rows > 1 else f"groups of {form.group}"
    return form.dtype + (f" in {shape}" if form.group else "") + ("" if form.symmetric else ", zero points")


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one module, by the last part of their names."""

    path: Path  # of the checkpoint, for messages
    name: str
    tensors: Mapping[str, StoredTensor]
    read: Callable[[str], Tensor]

    def only(self, *known: str) -> None:
        """Raises BuildError if the module has a tensor that its scheme does not read."""
        if unknown := sorted(self.tensors.keys() - {*known, "bias", "k_scale", "v_scale", "output_scale"}):
            raise BuildError(
                f"{self.path} stores '{self.name}.{unknown[0]}', which its quantisation does not explain (expected are "
                f"{', '.join(known)}); give a checkpoint without it, or the unquantised one"
            )

    def shape(self, suffix: str) -> tuple[int, int]:
        """The shape of a matrix. Raises BuildError: not there, or not a matrix."""
        tensor = self._tensor(suffix)
        if len(tensor.shape) != 2:
            raise self._wrong(suffix, "two axes")
        return tensor.shape[0], tensor.shape[1]

    def need(self, suffix: str, shape: Sequence[int], dtypes: Iterable[str]) -> Read:
        """Reads the tensor, in that shape (axes of length 1 may be missing or more), when it is called.

        Raises BuildError, now: not there, or of another shape or type.
        """
        tensor, wanted, dtypes = self._tensor(suffix), tuple(shape), tuple(dtypes)
        if tensor.dtype.name not in dtypes:
            raise self._wrong(suffix, f"{' or '.join(dtypes)}")
        if [n for n in tensor.shape if n != 1] != [n for n in wanted if n != 1]:
            raise self._wrong(suffix, f"the shape {list(wanted)}")
        return lambda: self.read(tensor.name).reshape(wanted)

    def scale(self, suffix: str, shape: Sequence[int], dtypes: Iterable[str] = FLOATS) -> Read:
        """`need` for scales, in float32; BuildError when they are read and one is negative or no number.

        uint8 are E8M0, powers of two.
        """
        stored = self.need(suffix, shape, dtypes)
        exponents = self._tensor(suffix).dtype.name == "uint8"

        def read() -> Tensor:
            scale = (stored().view(torch.float8_e8m0fnu) if exponents else stored()).float()
            if not bool((scale.isfinite() & (scale >= 0)).all()):
                raise BuildError(
                    f"{self.path} stores a scale in '{self.name}.{suffix}' that is negative or not finite; download "
                    "the checkpoint again"
                )
            return scale

        return read

    def number(self, suffix: str) -> float:
        """A scale of one element, read now."""
        found = float(self.scale(suffix, ())())
        if found == 0:
            raise BuildError(
                f"{self.path} stores 0 as '{self.name}.{suffix}', expected a scale above it; calibrate it again"
            )
        return found

    def _tensor(self, suffix: str) -> StoredTensor:
        if suffix not in self.tensors:
            raise BuildError(
                f"{self.path} stores '{self.name}' quantised, but without its '{suffix}'; download the checkpoint again"
            )
        return self.tensors[suffix]

    def _wrong(self, suffix: str, expected: str) -> BuildError:
        tensor = self._tensor(suffix)
        return BuildError(
            f"{self.path} stores '{self.name}.{suffix}' as {tensor.dtype.name} {list(tensor.shape)}, expected "
            f"{expected}; use config and weights of the same checkpoint"
        )


def by_module(path: Path, stored: Mapping[str, StoredTensor], read: Callable[[str], Tensor]) -> dict[str, Parts]:
    """The stored tensors, grouped by the module that owns them."""
    found: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        found[module][suffix] = tensor
    return {module: Parts(path, module, tensors, read) for module, tensors in found.items()}


def column_order(parts: Parts, suffix: str, columns: int, group: int) -> Tensor | None:
    """Columns of a matrix sorted by the group that the tensor `suffix` [K] gives them; None: they are already, or there
    is no such tensor.

    Raises BuildError: a group that has more or fewer columns than `group`.
    """
    if suffix not in parts.tensors:
        return None
    index = parts.need(suffix, (columns,), ["int32", "int64"])()
    expected = torch.arange(columns) // group
    if torch.equal(index.long(), expected):
        return None
    order = index.long().argsort(stable=True)
    if not torch.equal(index.long()[order], expected):
        raise BuildError(
            f"{parts.path} assigns the columns of '{parts.name}' to groups that are not all of {group} columns "
            f"('{suffix}'); download the checkpoint again"
        )
    return order
