"""Fusions that only the cuda target makes: neighbouring nodes that one of its kernels runs in one launch.

They are a part of compiling the plan. The engine's `model.onnx` stays as it was, for other targets and other GPUs, so
they are made on a copy, and each takes place only where it is certain that nobody else reads what it swallows.
"""

from collections.abc import Callable

import onnx_ir as ir

from ..passes import drop_dead
from ..passes.graph import INGOT, attributes, dims, made_by, new, nodes, operand, replace
from ..passes.verify import verify

Fusion = Callable[[ir.Model], None]


def gated_linears(model: ir.Model) -> None:
    """Linear, GatedActivation -> GatedLinear: the product's gates and ups need not be written and read again."""
    for node in nodes(model, "GatedActivation"):
        x, y = operand(node), node.outputs[0]
        product = made_by(x, "Linear", domain=INGOT)
        if product is None or x.is_graph_output() or len(x.uses()) != 1:
            continue
        replace(y, new(node, "GatedLinear", product.inputs, dims(y), y.dtype, INGOT, **attributes(node)))


FUSIONS: tuple[Fusion, ...] = (gated_linears,)


def fuse(graph: ir.Graph) -> ir.Graph:
    """A copy of `graph` after all `FUSIONS`; initialisers are shared with it. BuildError if one spoils the graph."""
    model = ir.Model(graph.clone(), ir_version=10)
    for fusion in FUSIONS:
        fusion(model)
        drop_dead(model)
        verify(model, fusion.__name__)
    return model.graph
