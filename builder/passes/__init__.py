"""From the exported graph to the engine's: an ordered list of named passes, the graph verified after each.

`optimise` changes a model in place and returns it. A pass is a plain function on an `onnx_ir.Model` that rewrites what
it recognises with certainty and leaves the rest; a graph with nothing recognised still runs, on standard ops.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

from .activation import fuse_gelu
from .folding import (
    cast_by_type,
    drop_no_ops,
    fold_constants,
    gather_rows,
    order_operands,
    static_shapes,
)
from .graph import constant, evaluate, made_by, nodes, replace
from .linear import fuse_bias, fuse_linear
from .logits import pick_rows_early
from .naming import name_nodes
from .norm import fuse_norm, fuse_residual
from .packing import fuse_gated_activation, pack_qkv, take_columns_early
from .rope import fuse_rope
from .rows import drop_batch_axis, drop_index_casts
from .sequences import lower_sequences
from .verify import verify

Pass = Callable[[ir.Model], None]


def share_common(model: ir.Model) -> None:
    """Equal nodes on equal inputs are computed once."""
    CommonSubexpressionEliminationPass()(model)


def drop_dead(model: ir.Model) -> None:
    """Nodes and initialisers that nobody reads."""
    RemoveUnusedNodesPass()(model)


def lift_constants(model: ir.Model) -> None:
    """Constants become initialisers, and so does what is computed from small ones: nothing is computed twice, and all
    constants are in the weights file."""
    lift = LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    lift(model)
    for node in nodes(model):
        known = (value is None or value.is_initializer() or made_by(value, "Constant") for value in node.inputs)
        if node.op_type != "Constant" and len(node.outputs) == 1 and all(known):
            try:
                replace(node.outputs[0], constant(node, evaluate(node.outputs[0], {})))
            except LookupError:  # a weight
                continue
    lift(model)


PASSES: tuple[Pass, ...] = (
    # what the exporter wrote, in few forms
    lower_sequences,
    fold_constants,
    static_shapes,
    gather_rows,
    cast_by_type,
    drop_no_ops,
    share_common,
    order_operands,
    # ops of our own, on [T, width]
    fuse_linear,
    fuse_bias,
    fuse_norm,
    fuse_gelu,
    drop_batch_axis,
    drop_index_casts,
    fuse_rope,
    # fewer and smaller ones
    take_columns_early,
    pack_qkv,
    fuse_gated_activation,
    pick_rows_early,
    share_common,
    fuse_residual,
    name_nodes,
    lift_constants,
)


def optimise(model: ir.Model, on_pass: Callable[[str, int], None] | None = None) -> ir.Model:
    """Runs `PASSES` on the model, in place, and returns it. `on_pass` hears each pass' name and the nodes after it.

    Raises:
        BuildError: the graph is not valid after a pass (a fault of the pass, or of the export for the first).
    """
    model.opset_imports.setdefault("ingot", 1)
    for step in PASSES:
        step(model)
        drop_dead(model)
        verify(model, step.__name__)
        if on_pass:
            on_pass(step.__name__, model.graph.num_nodes())
    return model
