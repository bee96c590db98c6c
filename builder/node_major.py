"""Runs a graph over many batches node by node: each node for all batches before the next one, as calibration wants it.

So a weight is in memory only while its node runs, whatever the size of the model, and what reaches a Linear from all
batches is there at once. Alive between nodes are the activations of one layer, on the host; on the device are the
weights of the node at hand, and of its activations those of one batch (with pages for one layer). The last Linear and
what follows are run batch by batch, since logits are large.
Invariant: whenever one looks, all batches are before the same node, so that a walk can be interrupted and gone on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, overload

import onnx_ir as ir
import torch
from torch import Tensor

from ..engines import step
from ..plugins.dtypes import TORCH_DTYPES, to_torch
from ..plugins.interpreter import Bound, Program, Values
from .passes.graph import nodes

# name of a Linear's weight, what the node reads from each batch [T, K] -> the weight [N, K] and the inputs that it is
# run with instead, or None: its own
Replace = Callable[[str, "OnDevice"], tuple[Tensor, Sequence[Tensor]] | None]
# what a node is, what each batch is about to hand it -> what each of them reads instead, by slot; nothing: as it is
Give = Callable[[Bound, Sequence[Values]], Sequence[Mapping[int, Tensor]]]
OnNode = Callable[[int, int, str], None]  # nodes done, of all, the weight of the one that begins ("": it has none)
Pools = dict[tuple[str, tuple[int, ...]], Tensor]
LARGE = 1 << 16  # numbers of a weight that is loaded when its node's turn comes


@dataclass(frozen=True)
class Windows:
    """Texts of equal length W, all in one step: [B, W] token ids."""

    tokens: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """The step's tensors: each text is a sequence of its own on a page of its own, W tokens wide; all logits."""
        num, width = self.tokens.shape
        each = torch.arange(num)
        tensors = {
            step.TOKENS: self.tokens.flatten(), step.POSITIONS: torch.arange(width).repeat(num),
            step.SLOTS: torch.arange(num * width), step.QUERY_START: torch.arange(num + 1) * width,
            step.KV_LEN: torch.full((num,), width), step.PAGES: each[:, None],
            step.LOGIT_ROWS: torch.arange(num * width),
        }  # fmt: skip
        return {name: tensor.to(torch.int32) for name, tensor in tensors.items()}


class Snapshots(Protocol):
    """Where a walk leaves what is alive before a node, so that another process can go on (`journal.Journal`)."""

    def due(self) -> bool: ...

    def save(self, node: int, alive: Sequence[Mapping[int, Tensor]]) -> None: ...

    def load(self) -> tuple[int, Sequence[Mapping[int, Tensor]]] | None: ...


@torch.inference_mode()
def run(
    model: ir.Model,
    batches: Sequence[Windows],
    replace: Replace = lambda name, inputs: None,
    on_node: OnNode = lambda done, total, name: None,
    give: Give | None = None,
    *,
    unread: int = 0,
    device: str = "cpu",
    snapshots: Snapshots | None = None,
) -> Iterator[Tensor]:
    """The logits [B * W, vocabulary] of each batch but the first `unread`, one after the other.

    replace: what Linear nodes are run with, asked once for each weight, in the order of the graph; inputs are on the
    device. give: asked at every node for what it reads instead of what is in its slots.
    `on_node(done, total, name)` as each node begins, and at the end.
    """
    walk = Walk(model, device)
    node, alive = 0, [walk.begin(windows) for windows in batches]
    if snapshots and (found := snapshots.load()):
        node, alive = found[0], [_with(values, own) for values, own in zip(alive, found[1], strict=True)]

    def begin(i: int) -> Iterator[Mapping[int, Tensor]]:
        """What each batch reads at a node instead of what is in its slots, one on the device at a time."""
        on_node(i, len(walk.nodes), walk.nodes[i].name)
        given = (give(walk.bound(i), alive) if give else ()) or [{}] * len(batches)
        slot, source = walk.nodes[i].weight, walk.nodes[i].source
        found = replace(walk.nodes[i].name, walk.reads(source, alive)) if slot else None
        if found is None:
            own = walk.weights(i)
            return ({**own, **each} for each in given)
        theirs = walk.weights(i, but=slot) | {slot: found[0].to(device)}
        return (theirs | {source: x} for x in found[1])

    try:
        while node < walk.head:
            instead = begin(node)
            after = [walk.launch(node, values, own) for values, own in zip(alive, instead, strict=True)]
            node, alive = node + 1, after
            if snapshots and snapshots.due():
                snapshots.save(node, [walk.own(values) for values in alive])
        for values, own in islice(zip(alive, begin(node), strict=True), unread, None):
            yield walk.finish(values, own)
        on_node(len(walk.nodes), len(walk.nodes), "")
    except (KeyboardInterrupt, SystemExit):
        if snapshots:
            snapshots.save(node, [walk.own(values) for values in alive])
        raise


@dataclass(frozen=True)
class Node:
    """One launch of a walk. lazy: name of each weight that is loaded for it, by slot."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    lazy: Mapping[int, str]
    name: str = ""  # of a Linear: its weight that nobody else reads, where that lies, and where what it multiplies does
    weight: int = 0
    source: int = 0


class Walk:
    """A graph whose nodes are launched one by one, with weights that come when they are needed.

    `nodes` in order, and `head`: the last Linear, from which on logits are made.
    """

    def __init__(self, model: ir.Model, device: str = "cpu"):
        self._model, self.device = model, device
        lazy = _lazy(model)
        # until a weight's turn comes its shape is all there is
        meta = {name: torch.empty(value.shape.numpy(), device="meta") for name, value in lazy.items() if value.shape}
        self._program = Program(model, meta)
        slots = {self._program.slot_of(value): value for value in lazy.values()}
        self._stored = {value.name or "": value for value in lazy.values()}
        own = linear_weights(model)
        self.nodes = []
        for node in self._program.nodes:
            names = {slot: slots[slot].name or "" for slot in node.sources if slot in slots}
            linear = node.sources[1] if node.op == "Linear" and names.get(node.sources[1]) in own else 0
            of_linear = (names[linear], linear, node.sources[0]) if linear else ()
            self.nodes.append(Node(tuple(node.sources), tuple(node.targets), names, *of_linear))
        linears = [i for i, node in enumerate(self._program.nodes) if node.op == "Linear"]
        self.head = linears[-1] if linears else len(self.nodes) - 1
        (self._logits,) = (slot for name, slot in self._program.outputs.items() if name == step.LOGITS)
        self._made = sorted({slot for node in self.nodes for slot in node.targets})
        self._pools: Pools = {}

    def bound(self, i: int) -> Bound:
        """The op of a node, its attributes and slots."""
        return self._program.nodes[i]

    def begin(self, windows: Windows) -> Values:
        """What is alive before the first node."""
        return self._program.begin({**windows.inputs(), **_pools(self._model, windows, self._pools, self.device)})

    def own(self, values: Values) -> dict[int, Tensor]:
        """What nodes made of a batch that is alive; the rest is in every `begin` of it."""
        return {slot: values[slot] for slot in self._made if values[slot] is not None}

    def reads(self, slot: int, alive: Sequence[Values]) -> OnDevice:
        """What is in a slot of each batch, moved to the device when it is asked for."""
        return OnDevice([values[slot] for values in alive], self.device)

    def weights(self, i: int, but: int = 0) -> dict[int, Tensor]:
        """The weights that are loaded for a node, on the device; all but that in one slot."""
        return {slot: self.weight(name) for slot, name in self.nodes[i].lazy.items() if slot != but}

    def weight(self, name: str) -> Tensor:
        return to_torch(self._stored[name].const_value).to(self.device)

    def launch(self, i: int, values: Values, instead: Mapping[int, Tensor]) -> Values:
        """What is alive after a node, on the host; `values` stay as they are. instead: read for what is in a slot."""
        node, after = self.nodes[i], values.copy()
        for slot in node.sources:
            after[slot] = _to(instead.get(slot, values[slot]), self.device)
        with torch.device(self.device) if self.device != "cpu" else nullcontext():
            self._program.launches[i](after)
        for slot in node.sources:
            if after[slot] is not None:  # others read it, as it was
                after[slot] = values[slot]
        for slot in node.targets:
            after[slot] = _to(after[slot], "cpu")
        return after

    def finish(self, values: Values, instead: Mapping[int, Tensor]) -> Tensor:
        """The logits, from what is alive before the head and what that reads instead."""
        values = self.launch(self.head, values, instead)
        for i in range(self.head + 1, len(self.nodes)):
            values = self.launch(i, values, self.weights(i))
        return values[self._logits]


class OnDevice(Sequence[Tensor]):
    """Tensors of the host that are moved to the device, and changed there, one by one, whenever they are asked for."""

    def __init__(self, tensors: Sequence[Tensor], device: str, change: Callable[[Tensor], Tensor] = lambda x: x):
        self._tensors, self._device, self._change = tensors, device, change

    def changed(self, change: Callable[[Tensor], Tensor]) -> OnDevice:
        """The same as `change`, by which no rows come or go, makes them."""
        return OnDevice(self._tensors, self._device, lambda x: change(self._change(x)))

    @property
    def num_rows(self) -> int:
        """Of all, which takes none of them to the device."""
        return sum(map(len, self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> OnDevice: ...
    def __getitem__(self, at: int | slice) -> Tensor | OnDevice:
        if isinstance(at, slice):
            return OnDevice(self._tensors[at], self._device, self._change)
        return self._change(self._tensors[at].to(self._device))


def linear_weights(model: ir.Model) -> Mapping[str, ir.Value]:
    """Weights that one Linear reads, and nobody else."""
    found = {}
    for node in nodes(model, "Linear"):
        value = node.inputs[1]
        if value is not None and value.is_initializer() and len(list(value.uses())) == 1 and value.name:
            found[value.name] = value
    return found


def _lazy(model: ir.Model) -> Mapping[str, ir.Value]:
    """Weights of Linears, and large ones whose readers read something else too: constants are computed beforehand."""
    linear = linear_weights(model)
    constant = set(model.graph.initializers.values())
    early: set[ir.Value] = set()
    for node in model.graph:
        if all(value is None or value in constant for value in node.inputs):
            constant.update(node.outputs)
            early.update(value for value in node.inputs if value is not None)
    return {
        name: value
        for name, value in model.graph.initializers.items()
        if value not in early and value.const_value is not None and (name in linear or value.const_value.size >= LARGE)
    }


def _with(values: Values, own: Mapping[int, Tensor]) -> Values:
    """What is alive once a walk got further: nothing but what it said is."""
    return [own.get(slot, value) for slot, value in enumerate(values)]


def _to(value: Tensor | list[Tensor] | None, device: str) -> Tensor | list[Tensor] | None:
    if isinstance(value, list):  # an ONNX sequence
        return [tensor.to(device) for tensor in value]
    return value if value is None else value.to(device)


def _pools(model: ir.Model, windows: Windows, shared: Pools, device: str) -> dict[str, Tensor]:
    """Pools of all layers. One serves all of a shape: a layer has read what it wrote before the next one writes."""
    pools = {}
    for value in model.graph.inputs:
        if value.name and value.name not in step.STEP_INPUTS and value.shape is not None and value.dtype is not None:
            shape = (*windows.tokens.shape, *(dim for dim in value.shape[2:] if isinstance(dim, int)))
            kind = value.name.partition(".")[0], shape  # keys and values of a layer are there at the same time
            if kind not in shared:
                shared[kind] = torch.zeros(shape, dtype=TORCH_DTYPES[int(value.dtype)], device=device)
            pools[value.name] = shared[kind]
    return pools
