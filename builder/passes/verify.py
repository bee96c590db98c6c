"""Checks a graph between passes: what ONNX's checker knows, strict shape inference, and that the op tables can run it.

Weights take no part: initialisers enter the checked proto as inputs with a shape and a type, so nothing is read from
disk and an 8B graph is checked in some 30 ms. Shapes that a pass left open are filled in from the inference.
"""

import onnx
import onnx_ir as ir
from onnx.shape_inference import InferenceError, infer_shapes

from ...engines.errors import BuildError
from ...plugins import OPS, register_schemas
from ...plugins.onnx_ops import ONNX_OPS


def verify(model: ir.Model, after: str) -> None:
    """Checks the graph and completes its shapes.

    Raises:
        BuildError: a value read before it is made, two values of one name, an unknown op or attribute, a shape or type
            that contradicts the op that makes it. `after` names the pass to blame.
    """
    register_schemas()
    for node in model.graph:
        table = OPS if node.domain == "ingot" else ONNX_OPS if node.domain in ("", "ai.onnx") else {}
        if node.op_type not in table:
            raise BuildError(
                f"after the pass '{after}' the graph contains {node.domain or 'ai.onnx'}::{node.op_type} "
                f"('{node.name}'), which no target can run; expected were the ops of plugins/"
            )
    try:
        proto = _proto(model)
        onnx.checker.check_model(proto)
        inferred = infer_shapes(proto, check_type=False, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, InferenceError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BuildError(f"after the pass '{after}' the graph is not valid: {reason}") from error
    _complete(model, inferred)


def _proto(model: ir.Model) -> onnx.ModelProto:
    """The model without weights: each initialiser is an input."""
    graph = model.graph
    values = [value for node in graph for value in node.outputs if value.shape is not None and value.type is not None]
    proto = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in graph],
        graph.name or "graph",
        [ir.serde.serialize_value(value) for value in (*graph.inputs, *graph.initializers.values()) if value.name],
        [ir.serde.serialize_value(value) for value in graph.outputs],
        value_info=[ir.serde.serialize_value(value) for value in values if not value.is_graph_output()],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.make_model(proto, opset_imports=opsets, ir_version=model.ir_version)


def _complete(model: ir.Model, inferred: onnx.ModelProto) -> None:
    """Gives a shape and a type to the values that lack one."""
    found = {info.name: info for info in (*inferred.graph.value_info, *inferred.graph.output)}
    for node in model.graph:
        for value in node.outputs:
            info = found.get(value.name or "")
            if info is None or (value.shape is not None and value.dtype is not None):
                continue
            known = ir.from_proto(info)
            value.dtype = value.dtype or known.dtype
            value.shape = value.shape or known.shape
