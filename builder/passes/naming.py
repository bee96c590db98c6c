"""Names people can read: a node is called after the weight it uses, a packed weight without its working number."""

import onnx_ir as ir

from .packed_weights import WORKING_NUMBER


def name_nodes(model: ir.Model) -> None:
    """`layers.0.mlp.down_proj` for the Linear with that weight; other nodes after their op and what they read."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        plain = (value.name or "").partition(WORKING_NUMBER)[0]
        if plain != value.name and plain not in graph.initializers:
            graph.initializers.pop(value.name or "")
            value.name = plain
            graph.initializers[plain] = value
    taken: set[str] = set()
    for number, node in enumerate(graph):
        weights = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
        name = weights[0].rpartition(".")[0] if weights else f"{node.op_type}.{number}"
        node.name = name if name not in taken else f"{name}.{number}"
        taken.add(node.name)
        node.metadata_props.clear()  # which rewrite rule made it
