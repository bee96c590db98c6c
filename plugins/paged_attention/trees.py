"""Graphs whose drafts may be a tree: one more input, which all their attention reads; absent or all ones without."""

import onnx_ir as ir

from ...engines.step import ANCESTORS, TOKENS
from .schema import SCHEMA

PLACE = [each.name for each in SCHEMA.inputs].index(ANCESTORS)


def with_ancestors(model: ir.Model) -> None:
    """Gives each `PagedAttention` the graph's new input `ancestors`, [T] int32."""
    graph = model.graph
    (tokens,) = (value for value in graph.inputs if value.name == TOKENS)
    given = ir.Value(name=ANCESTORS, type=tokens.type, shape=tokens.shape)
    graph.inputs.append(given)
    for node in graph:
        if node.domain == "ingot" and node.op_type == "PagedAttention":
            node.resize_inputs(PLACE + 1)
            node.replace_input_with(PLACE, given)
