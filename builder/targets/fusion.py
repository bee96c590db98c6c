"""Fusions that only the cuda target makes: neighbouring nodes that one of its kernels runs in one launch; before them
the Q/DQ form of a quantised model is lowered to products of what is stored.

They are a part of compiling the plan. The engine's `model.onnx` stays as it was, for other targets and other GPUs, so
they are made on a copy, and each takes place only where it is certain that nobody else reads what it swallows.
"""

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ...plugins.paged_attention.trees import with_ancestors
from ..passes import drop_dead
from ..passes.graph import INGOT, attributes, dims, made_by, new, nodes, operand, replace
from ..passes.lowering import lower_quantised
from ..passes.verify import verify

Fusion = Callable[[ir.Model], None]


def gated_linears(model: ir.Model) -> None:
    """Linear, GatedActivation -> GatedLinear: the product's gates and ups need not be written and read again."""
    for node in nodes(model, "GatedActivation"):
        x, y = operand(node), node.outputs[0]
        product = made_by(x, "Linear", domain=INGOT)
        if product is None or _read_elsewhere(x):
            continue
        replace(y, new(node, "GatedLinear", product.inputs, dims(y), y.dtype, INGOT, **attributes(node)))


def rotary_attentions(model: ir.Model) -> None:
    """Rope of a packed q|k|v, PagedAttention -> RotaryPagedAttention: keys are rotated on their way to the pool."""
    for node in nodes(model, "PagedAttention"):
        packed, y = operand(node), node.outputs[0]
        rotation = made_by(packed, "Rope", domain=INGOT)
        if rotation is None or node.inputs[1] is not None or _read_elsewhere(packed):
            continue
        options, attention = attributes(rotation), attributes(node)
        heads = options.pop("num_heads"), options.pop("head_dim")
        if heads != (attention["num_heads"] + attention["num_kv_heads"], attention["head_dim"]):
            continue
        inputs = [*rotation.inputs, *node.inputs[3:]]
        replace(y, new(node, "RotaryPagedAttention", inputs, dims(y), y.dtype, INGOT, **attention, **options))


def gated_quantised_linears(model: ir.Model) -> None:
    """QuantisedLinear, GatedActivation -> GatedQuantisedLinear."""
    for node in nodes(model, "GatedActivation"):
        x, y = operand(node), node.outputs[0]
        product = made_by(x, "QuantisedLinear", domain=INGOT)
        if product is None or _read_elsewhere(x):
            continue
        options = {**attributes(product), **attributes(node)}
        replace(y, new(node, "GatedQuantisedLinear", product.inputs, dims(y), y.dtype, INGOT, **options))


def quantised_results(model: ir.Model) -> None:
    """RMSNorm, GatedActivation or GatedQuantisedLinear, and QuantiseTokens that alone reads it -> one node."""
    for node in nodes(model, "QuantiseTokens"):
        x, options = operand(node), attributes(node)
        source = made_by(x, "RMSNorm", "GatedActivation", "GatedQuantisedLinear", domain=INGOT)
        group = options.get("group", 0)
        if source is None or _read_elsewhere(x) or group & (group - 1):
            continue
        outputs = list(node.outputs)
        match source.op_type:
            case "RMSNorm":
                if dims(x)[1] != dims(operand(source, 1))[0]:  # of each head
                    continue
                name, outputs = "QuantisedRMSNorm", outputs + list(source.outputs[1:])
            case "GatedActivation":
                name = "QuantisedGatedActivation"
            case _:
                name, options = "GatedQuantisedLinear", {"y_dtype": options["dtype"], "y_group": group}
        made = ir.node(name, list(source.inputs), {**attributes(source), **options}, domain=INGOT,
                       num_outputs=len(outputs))  # fmt: skip
        model.graph.insert_before(source, made)  # where its sum, too, is made before it is read
        for old, fresh in zip(outputs, made.outputs, strict=True):
            fresh.shape, fresh.type = old.shape, old.type
            replace(old, fresh)


def _read_elsewhere(value: ir.Value) -> bool:
    return value.is_graph_output() or len(value.uses()) != 1


FUSIONS: tuple[Fusion, ...] = (
    lower_quantised, gated_linears, gated_quantised_linears, quantised_results, rotary_attentions
)  # fmt: skip
VERIFYING: tuple[Fusion, ...] = (with_ancestors, *FUSIONS)  # of graphs whose drafts, to be verified, may be trees


def fuse(graph: ir.Graph, fusions: Sequence[Fusion] = FUSIONS) -> ir.Graph:
    """A copy of `graph` after all `fusions`; initialisers are shared with it. BuildError if one spoils the graph."""
    model = ir.Model(graph.clone(), ir_version=10)
    for fusion in fusions:
        fusion(model)
        drop_dead(model)
        verify(model, fusion.__name__)
    return model.graph
