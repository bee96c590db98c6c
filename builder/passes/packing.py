"""One matrix product where several read the same input: q|k|v, gate|up; and columns taken before they are computed.

Taking columns of a product is a product with those rows of the weight, so projections that a checkpoint stores packed
in its own order (GPT-NeoX by heads, Phi-3, GPT-2) fall apart into q, k, v first and are packed anew, as one weight in
the order q|k|v; where that is the stored order, the stored tensor is used as it is.
"""

import numpy as np
import onnx_ir as ir

from .graph import INGOT, attribute, constant_of, dims, is_op, new, nodes, producer, replace
from .packed_weights import Part, pack, parts_of, take_rows, zeros


def take_columns_early(model: ir.Model) -> None:
    """`Linear(x, W)[:, columns]` -> `Linear(x, W[columns])`, where every reader takes some columns of its own."""
    for linear in nodes(model, "Linear"):
        y = linear.outputs[0]
        taken = [(use.node, _columns(use.node)) for use in y.uses() if use.idx == 0]
        if y.is_graph_output() or not taken or len(taken) < len(y.uses()):
            continue
        if any(columns is None for _, columns in taken):
            continue
        everything = np.concatenate([columns for _, columns in taken])  # type: ignore[misc]
        if len(np.unique(everything)) < len(everything):
            continue  # computed once, read twice: stays so
        for node, columns in taken:
            assert columns is not None
            weight, bias = _rows(linear, columns)
            z = node.outputs[0]
            replace(z, new(node, "Linear", [linear.inputs[0], weight, bias], dims(z), z.dtype, INGOT))


def pack_qkv(model: ir.Model) -> None:
    """Three projections of one input, rotated alike -> one Linear, one Rope over q|k, attention on packed q|k|v."""
    for node in nodes(model, "PagedAttention"):
        query, key, value = node.inputs[:3]
        if query is None or key is None or value is None:
            continue
        ropes = [producer(v) for v in (query, key) if is_op(v, "Rope", domain=INGOT)]
        if len(ropes) == 1 or (ropes and not _rotate_alike(*ropes)):
            continue
        if ropes:
            query, key = ropes[0].inputs[0], ropes[1].inputs[0]
        packed = _pack([query, key, value], before=node)
        if packed is None:
            continue
        if ropes:
            attributes = {name: found.value for name, found in ropes[0].attributes.items()}
            attributes["num_heads"] = attribute(node, "num_heads") + attribute(node, "num_kv_heads")
            inputs = [packed, ropes[0].inputs[1]]
            packed = new(node, "Rope", inputs, dims(packed), packed.dtype, INGOT, **attributes)
        for index, operand in enumerate((packed, None, None)):
            node.replace_input_with(index, operand)


def fuse_gated_activation(model: ir.Model) -> None:
    """`act(gate(x)) * up(x)` -> one Linear for gate|up, and GatedActivation."""
    for node in nodes(model, "Mul"):
        y = node.outputs[0]
        for activated, up in (node.inputs, node.inputs[::-1]):
            found = _activation(activated)
            if found is None or up is None or len(activated.uses()) > 1:  # type: ignore[union-attr]
                continue
            gate, activation = found
            packed = _pack([gate, up], before=node, reads={gate: 2 if activation == "silu" else 1})
            if packed is not None and dims(gate) == dims(up):
                made = new(node, "GatedActivation", [packed], dims(y), y.dtype, INGOT, activation=activation)
                replace(y, made)
                break


def _activation(value: ir.Value | None) -> tuple[ir.Value, str] | None:
    """The value that was activated and the name of the activation."""
    node = None if value is None else value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    match node.op_type:
        case "Relu":
            return node.inputs[0], "relu"
        case "Gelu":
            return node.inputs[0], "gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu"
        case "Swish" if attribute(node, "alpha", 1.0) == 1.0:
            return node.inputs[0], "silu"
        case "Mul":  # x * sigmoid(x)
            for x, gate in (node.inputs, node.inputs[::-1]):
                if is_op(gate, "Sigmoid") and producer(gate).inputs[0] is x and x is not None:  # type: ignore[arg-type]
                    return x, "silu"
    return None


def _pack(values: list, before: ir.Node, reads: dict[ir.Value, int] | None = None) -> ir.Value | None:
    """One Linear for these, side by side; None unless all are Linears of one input that nobody else reads."""
    if not all(is_op(value, "Linear", domain=INGOT) for value in values):
        return None
    linears = [producer(value) for value in values]
    x = linears[0].inputs[0]
    if any(linear.inputs[0] is not x for linear in linears) or len(set(linears)) < len(linears):
        return None
    if any(len(value.uses()) != (reads or {}).get(value, 1) or value.is_graph_output() for value in values):
        return None
    weights = [linear.inputs[1] for linear in linears]
    biases = [linear.inputs[2] if len(linear.inputs) > 2 else None for linear in linears]
    graph = before.graph
    assert isinstance(graph, ir.Graph) and x is not None
    weight = pack(graph, [part for w in weights for part in parts_of(w)], weights[0])
    bias = None
    if any(biases):
        parts: list[Part] = []
        for b, w in zip(biases, weights, strict=True):
            parts += zeros(dims(w)[0]) if b is None else parts_of(b)
        bias = pack(graph, parts, next(b for b in biases if b is not None))
    # at the first of them: a reader of one part may come before the last
    return new(_first(linears), "Linear", [x, weight, bias], (dims(values[0])[0], dims(weight)[0]), x.dtype, INGOT)


def _first(linears: list[ir.Node]) -> ir.Node:
    graph = linears[0].graph
    assert graph is not None
    return next(node for node in graph if node in linears)


def _rows(linear: ir.Node, rows: np.ndarray) -> tuple[ir.Value, ir.Value | None]:
    """Weight and bias of some of the outputs of a Linear."""
    graph = linear.graph
    weight, bias = linear.inputs[1], linear.inputs[2] if len(linear.inputs) > 2 else None
    assert isinstance(graph, ir.Graph) and weight is not None
    taken = None if bias is None else pack(graph, take_rows(parts_of(bias), rows), bias)
    return pack(graph, take_rows(parts_of(weight), rows), weight), taken


def _columns(node: ir.Node) -> np.ndarray | None:
    """The columns of its [T, W] input that a Gather or Slice takes."""
    x = node.inputs[0]
    if x is None or len(dims(x)) != 2 or not isinstance(dims(x)[1], int):
        return None
    width = dims(x)[1]
    if node.op_type == "Gather" and attribute(node, "axis", 0) in (1, -1):
        index = constant_of(node.inputs[1])
        return None if index is None or index.dim() != 1 else index.numpy() % width
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        bounds = [constant_of(value) for value in node.inputs[1:]]
        if all(bound is not None and bound.numel() == 1 for bound in bounds) and int(bounds[2]) in (1, -1):  # type: ignore
            start, stop = (int(bound) for bound in bounds[:2])  # type: ignore[arg-type]
            step = int(bounds[3]) if len(bounds) > 3 else 1  # type: ignore[arg-type]
            return np.arange(width)[start : min(stop, width) : step] if step > 0 else None
    return None


def _rotate_alike(a: ir.Node, b: ir.Node) -> bool:
    """Two Ropes that differ in the number of heads only, each read once."""
    same = all(attribute(a, name, 0) == attribute(b, name, 0) for name in ("head_dim", "interleaved", "rotary_offset"))
    return same and a.inputs[1] is b.inputs[1] and len(a.outputs[0].uses()) == len(b.outputs[0].uses()) == 1
