"""From the exported graph to the engine's: an ordered list of named passes, the graph verified after each.

`optimise` changes a model in place and returns it. A pass is a plain function on an `onnx_ir.Model` that rewrites what
it recognises with certainty and leaves the rest; a graph with nothing recognised still runs, on standard ops.
"""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .folding import cast_by_type, drop_no_ops, fold_constants, gather_rows, lower_sequences, order_operands, static_shapes
from .linear import fuse_bias, fuse_linear
from .norm import fuse_norm
from .rows import drop_batch_axis
from .verify import verify

Pass = Callable[[ir.Model], None]


def share_common(model: ir.Model) -> None:
    """Equal nodes on equal inputs are computed once."""
    CommonSubexpressionEliminationPass()(model)


def drop_dead(model: ir.Model) -> None:
    """Nodes and initialisers that nobody reads."""
    RemoveUnusedNodesPass()(model)


PASSES: tuple[Pass, ...] = (
    lower_sequences,
    fold_constants,
    static_shapes,
    gather_rows,
    cast_by_type,
    drop_no_ops,
    share_common,
    order_operands,
    fuse_linear,
    fuse_bias,
    fuse_norm,
    drop_batch_axis,
)


def optimise(model: ir.Model, on_pass: Callable[[str, int], None] | None = None) -> ir.Model:
    """Runs `PASSES` on the model, in place, and returns it. `on_pass` hears each pass' name and the nodes after it.

    Raises:
        BuildError: the graph is not valid after a pass (a fault of the pass, or of the export for the first).
    """
    for step in PASSES:
        step(model)
        model.opset_imports.setdefault("ingot", 1)
        drop_dead(model)
        verify(model, step.__name__)
        if on_pass:
            on_pass(step.__name__, model.graph.num_nodes())
    return model
