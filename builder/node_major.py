"""Runs a graph over many batches node by node: each node for all batches before the next one, as calibration wants it.

So a weight is in memory only while its node runs, whatever the size of the model, and what reaches a Linear from all
batches is there at once. Alive between nodes are the activations of one layer. Reference ops, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from ..engines import step
from ..plugins.dtypes import TORCH_DTYPES, to_torch
from ..plugins.interpreter import Program
from .passes.graph import nodes

# name of a Linear's weight, what the node reads from each batch [T, K] -> the weight [N, K] and the inputs that it is
# run with instead, or None: its own
Replace = Callable[[str, Sequence[torch.Tensor]], tuple[torch.Tensor, Sequence[torch.Tensor]] | None]
Pools = dict[tuple[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """Texts of equal length W, all in one step: [B, W] token ids."""

    tokens: torch.Tensor

    def inputs(self) -> dict[str, torch.Tensor]:
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


@torch.inference_mode()
def run(
    model: ir.Model,
    batches: Sequence[Windows],
    replace: Replace = lambda name, inputs: None,
    on_node: Callable[[int, int], None] = lambda done, total: None,
) -> list[torch.Tensor]:
    """The logits [B * W, vocabulary] of each batch.

    replace: what Linear nodes are run with, asked once for each weight, in the order of the graph.
    `on_node(done, total)` counts nodes.
    """
    lazy = linear_weights(model)
    # a weight is loaded when its node's turn comes; until then its shape is all there is
    meta = {name: torch.empty(tuple(value.shape.numpy()), device="meta") for name, value in lazy.items() if value.shape}
    program = Program(model, meta)
    names = {program.slot_of(value): name for name, value in lazy.items()}
    shared: Pools = {}
    alive = [program.begin({**windows.inputs(), **_pools(model, windows, shared)}) for windows in batches]
    for done, (launch, node) in enumerate(zip(program.launches, program.nodes, strict=True), 1):
        slot = node.sources[1] if node.op == "Linear" else -1
        if slot not in names:
            for values in alive:
                launch(values)
        else:
            source, name = node.sources[0], names[slot]
            reads = [values[source] for values in alive]
            weight, instead = replace(name, reads) or (to_torch(lazy[name].const_value), reads)
            for values, own, x in zip(alive, reads, instead, strict=True):
                values[slot], values[source] = weight, x
                launch(values)
                values[slot] = None
                if values[source] is not None:  # others read it, as it is
                    values[source] = own
        on_node(done, len(program.launches))
    (logits,) = (slot for name, slot in program.outputs.items() if name == step.LOGITS)
    return [values[logits] for values in alive]


def linear_weights(model: ir.Model) -> Mapping[str, ir.Value]:
    """Weights that one Linear reads, and nobody else."""
    found = {}
    for node in nodes(model, "Linear"):
        value = node.inputs[1]
        if value is not None and value.is_initializer() and len(list(value.uses())) == 1 and value.name:
            found[value.name] = value
    return found


def _pools(model: ir.Model, windows: Windows, shared: Pools) -> dict[str, torch.Tensor]:
    """Pools of all layers. One serves all of a shape: a layer has read what it wrote before the next one writes."""
    pools = {}
    for value in model.graph.inputs:
        if value.name and value.name not in step.STEP_INPUTS and value.shape is not None and value.dtype is not None:
            shape = (*windows.tokens.shape, *(dim for dim in value.shape[2:] if isinstance(dim, int)))
            kind = value.name.partition(".")[0], shape  # keys and values of a layer are there at the same time
            if kind not in shared:
                shared[kind] = torch.zeros(shape, dtype=TORCH_DTYPES[int(value.dtype)])
            pools[value.name] = shared[kind]
    return pools
