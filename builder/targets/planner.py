"""Graph -> launches: one bucket at a time, each node by the tactic that `choose` picks, values placed in an arena."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import onnx_ir as ir

from ...engines.dtypes import DTYPES
from ...engines.errors import BuildError
from ...engines.plan import Argument, Bucket, Launch
from ...engines.step import KV_LEN, LOGIT_ROWS, LOGITS, PAGES, QUERY_START, TOKENS
from ...plugins import OPS
from ...plugins.opschema import complete_attributes
from ...plugins.tactic import Device, Kernel, Operand, Site, Tactic, Tensor
from .arena import Interval, place

Choose = Callable[[Site], Tactic]


@dataclass(frozen=True)
class Sizes:
    """What a bucket holds at most; `max_query` is 1 for decoding, 0 for any step."""

    tokens: int
    sequences: int
    rows: int
    max_query: int


def bucket_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> list[Sizes]:
    """Decoding by powers of two up to 16, then in steps that waste a quarter at most; steps with prompts likewise."""
    decode = [Sizes(n, n, n, 1) for n in _ladder(1, max_num_seqs)]
    mixed = [Sizes(n, max_num_seqs, max_num_seqs, 0) for n in _ladder(16, max_num_batched_tokens)]
    return decode + mixed


def _ladder(first: int, last: int) -> list[int]:
    """first, .., 16, 32, 48, 64, 96, 128, 192, 256, .. last: each power of two and, from 32 on, the middle."""
    steps, n = [], first
    while n < last:
        steps += [n] if n < 32 else [n, n + n // 2]
        n *= 2
    return [n for n in steps if n < last] + [last]


@dataclass
class Planner:
    """Plans buckets of one graph; kernels and node names are numbered over all of them."""

    graph: ir.Graph
    device: Device
    page_size: int
    max_pages: int
    choose: Choose
    kernels: dict[Kernel, int] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.nodes = tuple(node.name or f"{node.op_type}.{i}" for i, node in enumerate(self.graph))
        self._inputs = {value for value in self.graph.inputs if not value.is_initializer()}
        self._dims = {
            self._dim(TOKENS, 0): "tokens",
            self._dim(LOGIT_ROWS, 0): "rows",
            self._dim(KV_LEN, 0): "sequences",
        }
        (self._logits,) = (value for value in self.graph.outputs if value.name == LOGITS)

    def sites(self, sizes: Sizes) -> Iterator[tuple[int, ir.Node, Site]]:
        """The nodes of a bucket that launch something: their number, node and site."""
        for i, node in enumerate(self.graph):
            if node.op_type == "Constant":
                continue
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            num_inputs = len(node.inputs)
            if node.domain == "ingot":
                attributes = complete_attributes(node, OPS[node.op_type].schema, attributes)
                num_inputs = OPS[node.op_type].schema.max_input
            attributes.pop("layer", None)  # layers of the same shapes are one site
            inputs = [None if value is None else self.tensor(value, sizes) for value in node.inputs]
            inputs += [None] * (num_inputs - len(inputs))
            outputs = tuple(self.tensor(value, sizes) for value in node.outputs)
            max_query = sizes.max_query or None
            yield i, node, Site(node.op_type, attributes, tuple(inputs), outputs, self.device, max_query)

    def tensor(self, value: ir.Value, sizes: Sizes) -> Tensor:
        """Shape and type of a value in a bucket. Raises BuildError for a shape that the bucket does not settle."""
        if value.dtype is None or value.shape is None:
            raise BuildError(f"the value '{value.name}' has no shape or type, so the cuda target cannot plan it.")
        if value.name == QUERY_START:
            shape: list[int] = [sizes.sequences + 1]
        elif value.name == PAGES:
            shape = [sizes.sequences, self.max_pages]
        elif value in self._inputs and len(value.shape) == 4:  # KV pool: pages are counted when the engine opens
            shape = [1, self.page_size, *(int(d) for d in value.shape[2:])]  # type: ignore[arg-type]
        else:
            shape = [d if isinstance(d, int) else self._size(value, d, sizes) for d in value.shape]
        name = next(d.name for d in DTYPES.values() if d.onnx == value.dtype)
        return Tensor(tuple(shape), name, cold=value.is_initializer() or len(shape) == 4)

    @property
    def logits_dtype(self) -> str:
        return next(d.name for d in DTYPES.values() if d.onnx == self._logits.dtype)

    def plan(self, sizes: Sizes) -> Bucket:
        """The launches of a bucket. Raises BuildError for a node that nothing can run."""
        work = [(i, node, self.choose(site)) for i, node, site in self.sites(sizes)]
        head = [node.outputs[0].shape is not None and self._rows(node.outputs[0]) for _, node, _ in work]
        split = head.index(True) if True in head else len(work)
        offsets, workspaces, arena = self._places(work, split, sizes)
        launches: list[list[Launch]] = [[], []]
        for at, (i, node, tactic) in enumerate(work):
            for launch in tactic.launches:
                cubin = self.kernels.setdefault(launch.kernel, len(self.kernels))
                arguments = tuple(
                    self._argument(node, argument, offsets, workspaces[at])
                    if isinstance(argument, Operand)
                    else argument
                    for argument in launch.arguments
                )
                launches[at >= split].append(Launch(cubin, i, launch.grid, arguments))
        body, last = launches
        return Bucket(
            sizes.tokens, sizes.sequences, sizes.rows, sizes.max_query, arena, offsets[self._logits],
            tuple(body), tuple(last),
        )  # fmt: skip

    def _places(
        self, work: list[tuple[int, ir.Node, Tactic]], split: int, sizes: Sizes
    ) -> tuple[dict[ir.Value, int], list[int], int]:
        """Offsets of values and of each node's workspace, and the size of the arena."""
        first: dict[ir.Value, int] = {}
        last: dict[ir.Value, int] = {}
        for at, (_, node, _) in enumerate(work):
            for value in node.outputs:
                first[value] = last[value] = at
            for used in node.inputs:
                if used in first:
                    # what the head reads stays, since the head may run more than once
                    last[used] = len(work) if at >= split > first[used] else at
        last[self._logits] = len(work)
        values = list(first)
        intervals = [Interval(_num_bytes(self.tensor(v, sizes)), first[v], last[v]) for v in values]
        intervals += [Interval(tactic.workspace, at, at) for at, (_, _, tactic) in enumerate(work)]
        offsets, total = place(intervals)
        return dict(zip(values, offsets, strict=False)), offsets[len(values) :], total

    def _argument(self, node: ir.Node, operand: Operand, offsets: Mapping[ir.Value, int], workspace: int) -> Argument:
        if operand.kind == "workspace":
            return Argument("arena", offset=workspace + operand.index)
        value = (node.inputs if operand.kind == "input" else node.outputs)[operand.index]
        assert value is not None, f"{node.name}: a tactic reads an input that is absent"
        if value in offsets:
            return Argument("arena", offset=offsets[value])
        return Argument("input" if value in self._inputs else "weight", value.name or "")

    def _dim(self, name: str, axis: int) -> Any:
        value = next(value for value in self.graph.inputs if value.name == name)
        assert value.shape is not None
        return str(value.shape[axis])

    def _rows(self, value: ir.Value) -> bool:
        return bool(value.shape) and self._dims.get(str(value.shape[0])) == "rows"  # type: ignore[index]

    def _size(self, value: ir.Value, dim: Any, sizes: Sizes) -> int:
        name = self._dims.get(str(dim))
        if name is None:
            raise BuildError(f"the value '{value.name}' has the dimension {dim}, which no size of a step settles.")
        return getattr(sizes, name)


def _num_bytes(tensor: Tensor) -> int:
    return prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
