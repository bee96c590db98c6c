"""Runs an ONNX graph in torch, node by node: the CPU executor, the gate's runner, the oracle of the other targets.

Everything that does not depend on the inputs happens once: attributes are decoded, weights looked up, each node bound
to a Python callable (`binder.py`), nodes with only constant inputs evaluated. A call copies the list of slots and runs
the launches; each launch reads slots, writes slots and clears those whose last reader it was, so a value lives no
longer than in eager torch. Calls share nothing but constants and the KV pages handed in, so a `Program` is re-entrant.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import onnx_ir as ir
import torch

from ..engines.errors import EngineError
from ..engines.step import ANCESTORS
from . import OPS
from .binder import Binder, Run, from_reference
from .dtypes import to_torch
from .onnx_ops import ONNX_OPS
from .onnx_quantise import unpack_int4
from .opschema import complete_attributes, where

Values = list[Any]
Launch = Callable[[Values], None]
NOTHING = 0  # the slot of an absent optional input, always None


class Bound(NamedTuple):
    """What a launch computes: the node's op, the slots it reads and writes, and which of those read never change."""

    op: str
    attributes: dict[str, Any]
    sources: list[int]
    targets: list[int]
    constant: list[bool]


class Program:
    """An executable graph: `launches` in order, and `nodes`, which says what each of them is.

    Args:
        model: the graph; ops of domain `ingot` (`plugins.OPS`) and of standard ONNX (`plugins.onnx_ops`).
        weights: initialiser name -> tensor; an initialiser not in it is read from the model.
        kernels: op name -> binder, asked before the reference; one that returns None declines the node.

    Raises:
        EngineError: an op that is neither ours nor in the table, an initialiser without data, a missing input.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Binder] | None = None,
    ):
        self._kernels = kernels or {}
        self._slots: dict[ir.Value, int] = {}
        self._template: Values = [None]  # what a call starts from: constants in their slots
        self._packed: dict[int, tuple[int, ...]] = {}  # slot of INT4 numbers, two in a byte -> their shape
        self._unpacked: dict[int, int] = {}  # such a slot -> the one with a number in a byte, where somebody reads it
        self.launches: list[Launch] = []
        self.nodes: list[Bound] = []
        self.inputs: dict[str, int] = {}  # name -> slot
        graph = model.graph

        for name, value in graph.initializers.items():
            tensor = _initializer(name, value, weights)
            slot = self._place(value, tensor)
            if value.dtype == ir.DataType.INT4 and tensor.dtype == torch.uint8 and value.shape:
                self._packed[slot] = tuple(value.shape.numpy())
        for value in graph.inputs:
            if value not in self._slots:  # an initialiser may be listed as an input too
                self.inputs[_name(value)] = self._place(value)
        with torch.inference_mode():
            pending = self._bind(graph)
        self._schedule(pending, graph.outputs)
        self.outputs = {_name(value): self._slot(value, "the graph's outputs") for value in graph.outputs}

    @torch.inference_mode()
    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the graph: input name -> tensor in, output name -> tensor out. Surplus inputs are ignored.

        Runs under `torch.inference_mode`: outputs may be changed in place only under it.
        """
        values = self.begin(inputs)
        for run in self.launches:
            run(values)
        return {name: values[slot] for name, slot in self.outputs.items()}

    def begin(self, inputs: Mapping[str, torch.Tensor]) -> Values:
        """What the first launch is called with, for callers that run `launches` themselves."""
        values = self._template.copy()
        try:
            for name, slot in self.inputs.items():
                values[slot] = inputs.get(name) if name == ANCESTORS else inputs[name]
        except KeyError:
            raise EngineError(f"the graph input '{name}' was not given; given were {', '.join(inputs)}") from None
        return values

    def slot_of(self, value: ir.Value) -> int:
        """Where a launch finds an input, an initialiser or a node's output."""
        return self._slots[value]

    def _bind(self, graph: ir.Graph) -> list[tuple[ir.Node, Run, list[int]]]:
        """Binds every node; evaluates the constant ones now and returns the others, as (node, run, input slots)."""
        pending = []
        for node in graph:
            sources = [NOTHING if value is None else self._slot(value, where(node)) for value in node.inputs]
            run, sources = self._run_of(node, sources)
            if all(slot == NOTHING or self._template[slot] is not None for slot in sources):
                result = run(*(self._template[slot] for slot in sources))
                results = result if isinstance(result, tuple) else (result,)
                for value, constant in zip(node.outputs, results, strict=False):
                    self._place(value, constant)
            else:
                for value in node.outputs:
                    self._place(value)
                pending.append((node, run, sources))
        return pending

    def _run_of(self, node: ir.Node, sources: list[int]) -> tuple[Run, list[int]]:
        """What computes the node, and the slots it is called with: a kernel takes INT4 as it lies in the file."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.domain == "ingot" and node.op_type in OPS:
            schema, reference = OPS[node.op_type]
            attributes = complete_attributes(node, schema, attributes)
            binder, num_inputs = from_reference(reference), schema.max_input
        elif node.domain in ("", "ai.onnx") and node.op_type in ONNX_OPS:
            binder, num_inputs = ONNX_OPS[node.op_type], len(sources)
        else:
            known = "the ops of plugins.OPS (domain ingot) and of plugins/onnx_ops.py (domain ai.onnx) are known"
            raise EngineError(f"{where(node)} is an op this program cannot run; {known}")
        sources = [*sources, *[NOTHING] * (num_inputs - len(sources))]
        kernel = self._kernels.get(node.op_type)
        if kernel and (run := kernel(attributes, tuple(self._template[slot] for slot in sources))):
            return run, sources
        sources = [self._numbers(slot) for slot in sources]
        return _reference(binder, attributes, tuple(self._template[slot] for slot in sources), node), sources

    def _numbers(self, slot: int) -> int:
        """The slot itself; for packed INT4 one with a number in a byte, unpacked when it is first asked for."""
        if slot not in self._packed:
            return slot
        if slot not in self._unpacked:
            self._unpacked[slot] = len(self._template)
            self._template.append(unpack_int4(self._template[slot], self._packed[slot]))
        return self._unpacked[slot]

    def _schedule(self, pending: Sequence[tuple[ir.Node, Run, list[int]]], outputs: Sequence[ir.Value]) -> None:
        """Turns bound nodes into launches; each clears the slots that nobody reads after it."""
        alive = {self._slots[value] for value in outputs if value in self._slots}
        for slot, constant in enumerate(self._template):
            if constant is not None or slot == NOTHING:
                alive.add(slot)
        for node, run, sources in reversed(pending):
            targets = [self._slots[value] for value in node.outputs]
            last = {slot for slot in (*sources, *targets) if slot not in alive}
            alive.update(last)
            self.launches.append(_launch(run, sources, targets, sorted(last)))
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            constant = [self._template[slot] is not None for slot in sources]
            self.nodes.append(Bound(node.op_type, attributes, sources, targets, constant))
        self.launches.reverse()
        self.nodes.reverse()

    def _place(self, value: ir.Value, constant: Any = None) -> int:
        self._slots[value] = slot = len(self._template)
        self._template.append(constant)
        return slot

    def _slot(self, value: ir.Value, where: str) -> int:
        if value not in self._slots:
            raise EngineError(f"{where} reads '{value.name}', which no node before it, input or initialiser gives")
        return self._slots[value]


def _launch(run: Run, sources: list[int], targets: list[int], last: list[int]) -> Launch:
    """One step of the program; the two common forms are written out, since this is the cost of every node."""
    if len(targets) == 1 and len(sources) > 1:
        read, target = itemgetter(*sources), targets[0]

        def launch_single(values: Values) -> None:
            result = run(*read(values))
            values[target] = result[0] if isinstance(result, tuple) else result
            for slot in last:
                values[slot] = None

        return launch_single

    def launch(values: Values) -> None:
        result = run(*[values[slot] for slot in sources])
        for slot, value in zip(targets, result if isinstance(result, tuple) else (result,), strict=False):
            values[slot] = value
        for slot in last:
            values[slot] = None

    return launch


def _reference(binder: Binder, attributes: dict[str, Any], constants: tuple, node: ir.Node) -> Run:
    run = binder(attributes, constants)
    if run is None:
        raise EngineError(f"{where(node)} has attributes or inputs that the op table does not serve: {attributes}")
    return run


def _initializer(name: str, value: ir.Value, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name in weights:
        return weights[name]
    if value.const_value is None:
        raise EngineError(f"the initialiser '{name}' has no data in the graph and none was given in the weights")
    return to_torch(value.const_value)


def _name(value: ir.Value) -> str:
    if not value.name:
        raise EngineError("a graph input or output has no name; every one of them must have one")
    return value.name
