"""The operands of a site in one region of memory: where each lies, and what is in it while its tactics run."""

from __future__ import annotations

from functools import cache

import numpy as np

from ...engines.dtypes import DTYPES
from ...plugins.tactic import Operand, Site
from .steps import Step, pool_of

NUMBERS = 1_000_003  # of a pattern: a prime, so that rows of no width repeat soon
SMALL = 1 / 16  # what the numbers of weights and scales are multiplied with: sums of products stay of moderate size
INT8 = 16.0  # their standard deviation as int8


class Operands:
    """Where the operands of a site lie in the region: fixed ones first, then copies of the cold ones."""

    def __init__(self, site: Site, workspace: int, step: Step | None):
        self._site, self._step = site, step
        num_pages = step.num_pages(pool_of(site).shape[1]) if step else 1
        self._at: dict[tuple[str, int], tuple[bool, int]] = {}
        self.fixed_bytes = self.cold_bytes = 0
        for kind, tensors in (("input", site.inputs), ("output", site.outputs)):
            for i, tensor in enumerate(tensors):
                if tensor is None:
                    continue
                size = _aligned(tensor.num_bytes * (num_pages if len(tensor.shape) == 4 else 1))
                if tensor.cold:
                    self._at[kind, i] = True, self.cold_bytes
                    self.cold_bytes += size
                else:
                    self._at[kind, i] = False, self.fixed_bytes
                    self.fixed_bytes += size
        self._workspace, self._num_pages = self.fixed_bytes, num_pages
        self.fixed_bytes += _aligned(workspace)

    def offset(self, operand: Operand, copy: int) -> int:
        if operand.kind == "workspace":
            return self._workspace + operand.index
        cold, offset = self._at[operand.kind, operand.index]
        return (self.fixed_bytes + copy * self.cold_bytes if cold else 0) + offset + operand.offset

    def arrays(self, generator: np.random.Generator) -> list[tuple[int, np.ndarray]]:
        """Integers that the kernels index with, (offset, values)."""
        values: dict[int, np.ndarray] = {}
        if self._step:
            values = self._step.arrays(self._site)
        else:
            most = {"Gather": 0, "Experts": 3}.get(self._site.op)  # the operand whose first axis is indexed
            for i, tensor in enumerate(self._site.inputs):
                if tensor is not None and tensor.dtype in ("int32", "int64"):
                    indexed = None if most is None else self._site.inputs[most]
                    bound = 1024 if indexed is None else indexed.shape[0]
                    values[i] = generator.integers(0, bound, tensor.shape, dtype=tensor.dtype)
        return [(self.offset(Operand("input", i), 0), array) for i, array in values.items()]

    def numbers(self) -> list[tuple[int, int, np.ndarray]]:
        """What the other inputs hold where results are compared: (offset in the first copy, bytes, bytes to repeat).

        Normal numbers: states and pools of deviation 1, so that attention prefers some keys; weights and scales less,
        and what may be a scale of keys is positive, since their greatest is looked for before they are multiplied.
        """
        found = []
        for i, tensor in enumerate(self._site.inputs):
            if tensor is not None and tensor.dtype not in ("int32", "int64"):
                pool = len(tensor.shape) == 4
                size = tensor.num_bytes * (self._num_pages if pool else 1)
                pattern = _pattern(i, tensor.dtype, tensor.cold and not pool, len(tensor.shape) < 2)
                found.append((self.offset(Operand("input", i), 0), size, pattern))
        return found

    def written(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each output and of the workspace."""
        outputs = enumerate(self._site.outputs)
        workspace = (self._workspace, self.fixed_bytes - self._workspace)
        return [*((self.offset(Operand("output", i), 0), tensor.num_bytes) for i, tensor in outputs), workspace]


@cache
def _pattern(seed: int, dtype: str, small: bool, positive: bool) -> np.ndarray:
    """Bytes [n] of random numbers of a type, of all integers where it has less than 8 bits or no sign."""
    generator = np.random.default_rng(seed)
    if dtype in ("int4", "uint8"):
        return generator.integers(0, 256, NUMBERS, np.uint8)
    numbers = generator.standard_normal(NUMBERS, np.float32)
    if dtype == "int8":
        return np.rint(INT8 * numbers).clip(-127, 127).astype(np.int8).view(np.uint8)
    numbers = np.abs(numbers) if positive else numbers
    return (numbers * (SMALL if small else 1)).astype(DTYPES[dtype].numpy).view(np.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-max(1, num_bytes) // 256) * 256
