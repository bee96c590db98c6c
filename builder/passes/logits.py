"""Only rows whose logits are wanted go on after the last attention.

`logit_rows` picks rows right before the head in the exported graph. A row-wise op on picked rows gives the picked rows
of its result, so the pick moves up: past the last norm, the last MLP, the last output projection. A prompt of 2,000
tokens then costs one row in all of them.
"""

import onnx_ir as ir

from ...engines.step import LOGIT_ROWS
from .graph import attribute, attributes, constant_of, dims, new, replace
from .rows import ELEMENTWISE

ALONG_ROW = frozenset("Experts GatedActivation LayerNormalization Linear LogSoftmax RMSNorm Softmax TopK".split())


def pick_rows_early(model: ir.Model) -> None:
    """Every 2-D row-wise op whose readers all pick the rows `logit_rows` works on those rows alone."""
    index = next((value for value in model.graph.inputs if value.name == LOGIT_ROWS), None)
    if index is None:
        return
    for node in reversed(list(model.graph)):
        uses = [use for value in node.outputs for use in value.uses()]
        if not uses or not _is_row_wise(node) or any(value.is_graph_output() for value in node.outputs):
            continue
        if all(use.idx == 0 and _picks(use.node, index) for use in uses):
            _pick_before(node, index)


def _picks(node: ir.Node, index: ir.Value) -> bool:
    return node.op_type == "Gather" and attribute(node, "axis", 0) == 0 and node.inputs[1] is index


def _is_row_wise(node: ir.Node) -> bool:
    """On [T, W] values and along the last axis at most."""
    if any(len(dims(value)) != 2 for value in node.outputs):
        return False
    if node.op_type in ("ReduceSum", "ReduceMean", "ReduceMax"):
        axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes is not None and axes.tolist() in ([-1], [1]) and attribute(node, "keepdims", 1) == 1
    return node.op_type in ELEMENTWISE or (node.op_type in ALONG_ROW and attribute(node, "axis", -1) in (1, -1))


def _pick_before(node: ir.Node, index: ir.Value) -> None:
    """The node on the picked rows of its inputs; the Gathers of its outputs go."""
    tokens = dims(node.outputs[0])[0]
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is not None and not value.is_initializer() and dims(value)[:1] == (tokens,):
            value = new(node, "Gather", [value, index], (*dims(index), *dims(value)[1:]), value.dtype, axis=0)
        inputs.append(value)
    made = ir.node(node.op_type, inputs, attributes(node), domain=node.domain, num_outputs=len(node.outputs))
    assert node.graph is not None
    node.graph.insert_before(node, made)
    for old, picked in zip(node.outputs, made.outputs, strict=True):
        picked.shape, picked.type = ir.Shape((*dims(index), *dims(old)[1:])), old.type
        for use in list(old.uses()):
            replace(use.node.outputs[0], picked)
            node.graph.remove(use.node, safe=True)
    node.graph.remove(node, safe=True)  # else it would still read what its inputs' makers want to pick from
