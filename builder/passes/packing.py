"""One matrix product where several read the same input: q|k|v, gate|up; and columns taken before they are computed.

Taking columns of a product is a product with those rows of the weight, so projections that a checkpoint stores packed
in its own order (GPT-NeoX by heads, Phi-3, GPT-2) fall apart into q, k, v first and are packed anew, as one weight in
the order q|k|v; where that is the stored order, the stored tensor is used as it is.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .graph import INGOT, attribute, attributes, constant_of, dims, made_by, new, nodes, operand, replace, size
from .packed_weights import pack, parts_of, same_kind, take_rows, zeros


def take_columns_early(model: ir.Model) -> None:
    """`Linear(x, W)[:, columns]` -> `Linear(x, W[columns])`, where every reader takes columns of its own."""
    for linear in nodes(model, "Linear"):
        y = linear.outputs[0]
        taken = [(use.node, _columns(use.node) if use.idx == 0 else None) for use in y.uses()]
        chosen = [columns for _, columns in taken if columns is not None]
        if y.is_graph_output() or not taken or len(chosen) < len(taken):
            continue
        everything = np.concatenate(chosen)
        if len(np.unique(everything)) < len(everything):
            continue  # computed once, read twice: stays so
        weight, bias = operand(linear, 1), linear.inputs[2] if len(linear.inputs) > 2 else None
        for (node, _), columns in zip(taken, chosen, strict=True):
            rows = pack(model.graph, take_rows(parts_of(weight), columns), weight)
            offset = None if bias is None else pack(model.graph, take_rows(parts_of(bias), columns), bias)
            z = node.outputs[0]
            replace(z, new(node, "Linear", [linear.inputs[0], rows, offset], dims(z), z.dtype, INGOT))


def pack_qkv(model: ir.Model) -> None:
    """Three projections of one input, rotated alike -> one Linear, one Rope over q|k, attention on packed q|k|v."""
    for node in nodes(model, "PagedAttention"):
        if None in node.inputs[:3]:
            continue
        query, key, value = (operand(node, index) for index in range(3))
        q_rope, k_rope = made_by(query, "Rope", domain=INGOT), made_by(key, "Rope", domain=INGOT)
        if q_rope is not None and k_rope is not None and _rotate_alike(q_rope, k_rope):
            packed = _side_by_side(model.graph, [operand(q_rope), operand(k_rope), value])
            if packed is None:
                continue
            heads = attribute(node, "num_heads") + attribute(node, "num_kv_heads")
            options = {**attributes(q_rope), "num_heads": heads}
            packed = new(node, "Rope", [packed, q_rope.inputs[1]], dims(packed), packed.dtype, INGOT, **options)
        elif q_rope is None and k_rope is None:
            packed = _side_by_side(model.graph, [query, key, value])
            if packed is None:
                continue
        else:
            continue
        for index, replacement in enumerate((packed, None, None)):
            node.replace_input_with(index, replacement)


def fuse_gated_activation(model: ir.Model) -> None:
    """`act(gate(x)) * up(x)` -> one Linear for gate|up, and GatedActivation."""
    for node in nodes(model, "Mul"):
        y = node.outputs[0]
        for activated, up in ((operand(node), operand(node, 1)), (operand(node, 1), operand(node))):
            found = _activation(activated)
            if found is None or len(activated.uses()) > 1 or dims(found[0]) != dims(up):
                continue
            gate, activation, num_reads = found
            packed = _side_by_side(model.graph, [gate, up], [num_reads, 1])
            if packed is not None:
                replace(y, new(node, "GatedActivation", [packed], dims(y), y.dtype, INGOT, activation=activation))
                break


def _activation(value: ir.Value) -> tuple[ir.Value, str, int] | None:
    """The value that was activated, the name of the activation, and how often computing it reads the value."""
    node = made_by(value, "Relu", "Gelu", "Swish", "Mul")
    if node is None:
        return None
    match node.op_type:
        case "Relu":
            return operand(node), "relu", 1
        case "Gelu":
            return operand(node), "gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu", 1
        case "Swish":
            return (operand(node), "silu", 1) if attribute(node, "alpha", 1.0) == 1.0 else None
    for x, gate in ((operand(node), operand(node, 1)), (operand(node, 1), operand(node))):  # x * sigmoid(x)
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and operand(sigmoid) is x and len(gate.uses()) == 1:
            return x, "silu", 2
    return None


def _side_by_side(
    graph: ir.Graph, values: Sequence[ir.Value], num_reads: Sequence[int] | None = None
) -> ir.Value | None:
    """One Linear for all of these; None unless they are Linears of one input that are read only here,
    with weights that can lie in one."""
    made = [made_by(value, "Linear", domain=INGOT) for value in values]
    linears = [linear for linear in made if linear is not None]
    if len(linears) < len(values) or len(set(linears)) < len(linears):
        return None
    x = operand(linears[0])
    if any(linear.inputs[0] is not x for linear in linears) or any(value.is_graph_output() for value in values):
        return None
    if [len(value.uses()) for value in values] != list(num_reads or [1] * len(values)):
        return None
    weights = [operand(linear, 1) for linear in linears]
    if not same_kind(weights):
        return None
    biases = [linear.inputs[2] if len(linear.inputs) > 2 else None for linear in linears]
    weight = pack(graph, [part for stored in weights for part in parts_of(stored)], weights[0])
    bias, given = None, [b for b in biases if b is not None]
    if given:
        lengths = [size(stored, 0) for stored in weights]
        parts = [zeros(n) if b is None else parts_of(b) for b, n in zip(biases, lengths, strict=True)]
        bias = pack(graph, [part for group in parts for part in group], given[0])
    first = next(node for node in graph if node in linears)  # a reader of one may come before the last
    return new(first, "Linear", [x, weight, bias], (dims(x)[0], size(weight, 0)), x.dtype, INGOT)


def _columns(node: ir.Node) -> np.ndarray | None:
    """The columns of its [T, W] input that a Gather or Slice takes."""
    x = operand(node)
    if len(dims(x)) != 2 or not isinstance(dims(x)[1], int):
        return None
    every = np.arange(size(x, 1))
    if node.op_type == "Gather" and attribute(node, "axis", 0) in (1, -1):
        index = constant_of(node.inputs[1])
        return None if index is None or index.dim() != 1 else every[index.numpy()]
    if node.op_type == "Slice" and len(node.inputs) > 3:
        bounds = [constant_of(value) for value in node.inputs[1:]]
        numbers = [int(bound) for bound in bounds if bound is not None and bound.numel() == 1]
        if len(numbers) == len(bounds) and numbers[2] in (1, -1):
            start, stop, _, step = (*numbers, 1)[:4]
            return every[start:stop:step] if step > 0 else None
    return None


def _rotate_alike(a: ir.Node, b: ir.Node) -> bool:
    """Two Ropes that differ in the number of heads only, each read once."""
    same = all(attribute(a, name, 0) == attribute(b, name, 0) for name in ("head_dim", "interleaved", "rotary_offset"))
    return same and a.inputs[1] is b.inputs[1] and len(a.outputs[0].uses()) == len(b.outputs[0].uses()) == 1
