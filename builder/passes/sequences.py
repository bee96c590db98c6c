"""torch's `chunk` and `split`, which the exporter writes with sequences of tensors, -> Slice: no target has them."""

import onnx_ir as ir

from .graph import attribute, constant_of, dims, integers, made_by, new, nodes, operand, replace, scalar_of


def lower_sequences(model: ir.Model) -> None:
    """`SequenceAt(SplitToSequence(x, size), i)` -> `Slice(x, ...)`."""
    for node in nodes(model, "SequenceAt"):
        index = scalar_of(node.inputs[1])
        split = made_by(node.inputs[0], "SplitToSequence")
        if split is None or len(split.inputs) < 2 or not attribute(split, "keepdims", 1):
            continue
        x, sizes, y = operand(split), constant_of(split.inputs[1]), node.outputs[0]
        if x.shape is None or y.shape is None or sizes is None or not isinstance(index, int) or index < 0:
            continue
        axis = attribute(split, "axis", 0) % len(dims(x))
        total = dims(x)[axis]
        if not isinstance(total, int):
            continue
        if sizes.dim() == 0:
            start, stop = index * int(sizes), min((index + 1) * int(sizes), total)
        else:
            start, stop = int(sizes[:index].sum()), int(sizes[: index + 1].sum())
        bounds = [integers(node, [n]) for n in (start, stop, axis)]
        replace(y, new(node, "Slice", [x, *bounds], dims(y), x.dtype))
