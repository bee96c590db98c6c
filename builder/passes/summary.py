"""What a graph is made of, for `build-engine -v` and `ingot inspect`."""

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Summary:
    """Ops of a graph, constants not counted. A layer is what lies from one attention to the next."""

    ops: Counter[str]
    layers: tuple[Counter[str], ...]  # one less than attention layers: behind the last is the head

    @property
    def num_nodes(self) -> int:
        return self.ops.total()

    def __str__(self) -> str:
        kinds = Counter(_listed(layer) for layer in self.layers)
        lines = [f"{self.num_nodes} nodes: {_listed(self.ops)}"]
        for listed, count in kinds.most_common():
            total = next(layer.total() for layer in self.layers if _listed(layer) == listed)
            lines.append(f"  {total} a layer ({count} of {len(self.layers)}): {listed}")
        return "\n".join(lines)


def summarise(model: ir.Model) -> Summary:
    """Counts the ops of a graph, in all and from each attention to the next."""
    ops = [node.op_type for node in model.graph if node.op_type != "Constant"]
    attention = [index for index, op_type in enumerate(ops) if op_type == "PagedAttention"]
    layers = tuple(Counter(ops[a:b]) for a, b in zip(attention, attention[1:], strict=False))
    return Summary(Counter(ops), layers)


def describe(model: ir.Model) -> str:
    """The summary in a few lines: all ops, then the ops of each kind of layer."""
    return str(summarise(model))


def _listed(ops: Counter[str]) -> str:
    return ", ".join(
        f"{count} {op_type}" for op_type, count in sorted(ops.items(), key=lambda item: (-item[1], item[0]))
    )
