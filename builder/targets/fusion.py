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


def rotary_attentions(model: ir.Model) -> None:
    """Rope of a packed q|k|v, PagedAttention -> RotaryPagedAttention: keys are rotated on their way to the pool."""
    for node in nodes(model, "PagedAttention"):
        packed, y = operand(node), node.outputs[0]
        rotation = made_by(packed, "Rope", domain=INGOT)
        if rotation is None or node.inputs[1] is not None or packed.is_graph_output() or len(packed.uses()) != 1:
            continue
        options, attention = attributes(rotation), attributes(node)
        heads = options.pop("num_heads"), options.pop("head_dim")
        if heads != (attention["num_heads"] + attention["num_kv_heads"], attention["head_dim"]):
            continue
        inputs = [*rotation.inputs, *node.inputs[3:]]
        replace(y, new(node, "RotaryPagedAttention", inputs, dims(y), y.dtype, INGOT, **attention, **options))


FUSIONS: tuple[Fusion, ...] = (gated_linears, rotary_attentions)


def fuse(graph: ir.Graph) -> ir.Graph:
    """A copy of `graph` after all `FUSIONS`; initialisers are shared with it. BuildError if one spoils the graph."""
    model = ir.Model(graph.clone(), ir_version=10)
    for fusion in FUSIONS:
        fusion(model)
        drop_dead(model)
        verify(model, fusion.__name__)
    return model.graph
