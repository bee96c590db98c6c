"""Smoothing in the graph: columns of a weight times s, and what it reads divided by s, by whoever makes it.

X W^T = (X / s) (W * s)^T for any s [K]. What makes X takes 1 / s where it can, so that an engine computes nothing more:

* a norm into its weight, unless others read its result too;
* GatedActivation(gate|up) = act(gate) * up into the rows of `up`, in the product before it;
* attention into the rows of v, since its result is a mean of v's; heads that share a v share s.

Elsewhere a Mul stands in front. Invariant: in exact arithmetic the graph computes what it did. In the numbers of norms
and of Mul s is chosen so (`Site.fit`) that 1 / s times what they hold is one of their numbers: nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import onnx_ir as ir
import torch

from ...plugins.dtypes import TORCH_DTYPES, to_torch
from .graph import INGOT, attribute, dims, made_by, new, operand, size


@dataclass(frozen=True)
class Site:
    """Linears that read the same x [T, K] and are smoothed together."""

    x: ir.Value
    linears: tuple[ir.Node, ...]
    names: tuple[str, ...] = field(init=False)  # of their weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(operand(node, 1).name or "" for node in self.linears))

    def share(self, s: torch.Tensor) -> torch.Tensor:
        """Positive numbers [K] as they can be here: one for all heads that read the same v (their geometric mean)."""
        attention = self._attention()
        if attention is None:
            return s
        heads, shared, width = _heads(attention)
        of_v = s.view(shared, heads // shared, width).clamp(min=1e-30).log().mean(1, keepdim=True).exp()
        return of_v.expand(-1, heads // shared, -1).flatten()

    def fit(self, s: torch.Tensor) -> torch.Tensor:
        """The s nearest to this one by which what makes x can be divided without rounding: [K] float32.

        Both are on the host, as what the graph holds.
        """
        s, norm = self.share(s.float()), self._norm()
        if norm is not None:
            weight = to_torch(operand(norm, 1).const_value)
            old = weight.float() + attribute(norm, "weight_offset", 0.0)
            stored = _divided(weight, s, attribute(norm, "weight_offset", 0.0))
            found = old / (stored.float() + attribute(norm, "weight_offset", 0.0))
        elif self._attention() is None and self._gated() is None:
            found = 1 / self._reciprocal(s).float()
        else:
            return s  # weights, which are rounded afterwards anyway
        return found.where(found.isfinite() & (found > 0), 1.0)

    def apply(self, s: torch.Tensor) -> None:
        """Rewrites the graph, in place; s [K] as `fit` gave it."""
        for node in self.linears:
            _change(operand(node, 1), partial(_columns, s=s))
        if (norm := self._norm()) is not None:
            offset = attribute(norm, "weight_offset", 0.0)
            for index in range(1, 3 if norm.op_type == "LayerNormalization" and len(norm.inputs) > 2 else 2):
                _own(norm, index)
                _change(operand(norm, index), partial(_divided, s=s, offset=offset))
        elif (linear := self._gated()) is not None:
            _divide_rows(linear, size(linear.outputs[0], 1) // 2, s)
        elif (attention := self._attention()) is not None:
            heads, shared, width = _heads(attention)
            made = _value_product(attention)
            assert made is not None
            _divide_rows(made[0], made[1], s.view(shared, heads // shared, width)[:, 0].flatten())
        else:
            self._multiply(s)

    def _source(self) -> ir.Value | None:
        """What x is, or what x is some rows of; None where others read it too."""
        x, num_readers = self.x, len(self.linears)
        while len(x.uses()) == num_readers and not x.is_graph_output():
            gather = made_by(x, "Gather")
            if gather is None or attribute(gather, "axis", 0) != 0:
                return x
            x, num_readers = operand(gather), 1
        return None

    def _norm(self) -> ir.Node | None:
        x = self._source()
        node = made_by(x, "RMSNorm", domain=INGOT) or made_by(x, "LayerNormalization")
        if node is None or node.outputs[0] is not x:
            return None
        weights = [value for value in node.inputs[1 : 2 if node.op_type == "RMSNorm" else 3] if value is not None]
        whole = all(value.is_initializer() and dims(value) == dims(self.x)[-1:] for value in weights)
        return node if whole else None  # a norm by heads has fewer numbers than columns

    def _gated(self) -> ir.Node | None:
        """The product before the activation."""
        node = made_by(self._source(), "GatedActivation", domain=INGOT)
        return None if node is None else _product(operand(node))

    def _attention(self) -> ir.Node | None:
        node = made_by(self._source(), "PagedAttention", domain=INGOT)
        return node if node is not None and _value_product(node) is not None else None

    def _reciprocal(self, s: torch.Tensor) -> torch.Tensor:
        assert self.x.dtype is not None
        return (1 / s).to(TORCH_DTYPES[int(self.x.dtype)])

    def _multiply(self, s: torch.Tensor) -> None:
        first, name = self.linears[0], f"{self.names[0]}.smoothing"
        factor = ir.Value(name=name, shape=ir.Shape(tuple(s.shape)), type=self.x.type)
        factor.const_value = ir.tensor(self._reciprocal(s), name=name)
        assert first.graph is not None
        first.graph.register_initializer(factor)
        result = new(first, "Mul", [self.x, factor], dims(self.x), self.x.dtype)
        result.name = f"{self.names[0]}.smoothed"
        for node in self.linears:
            node.replace_input_with(0, result)


def _product(y: ir.Value) -> ir.Node | None:
    """The Linear that makes y for one reader, with a weight (and bias) that no other node reads."""
    node = made_by(y, "Linear", domain=INGOT)
    if node is None or len(y.uses()) != 1 or y.is_graph_output():
        return None
    weights = [value for value in node.inputs[1:] if value is not None]
    return node if all(value.is_initializer() and len(value.uses()) == 1 for value in weights) else None


def _heads(attention: ir.Node) -> tuple[int, int, int]:
    """Heads, heads of v, columns of v."""
    return attribute(attention, "num_heads"), attribute(attention, "num_kv_heads"), attribute(attention, "v_head_dim")


def _value_product(attention: ir.Node) -> tuple[ir.Node, int] | None:
    """The Linear that makes v and the first of its rows that do; None where v does not come straight from one."""
    if attention.inputs[2] is not None:
        linear = _product(attention.inputs[2])
        return None if linear is None else (linear, 0)
    packed = operand(attention)
    before = attribute(attention, "num_heads") + attribute(attention, "num_kv_heads")
    first = before * attribute(attention, "head_dim")
    rope = made_by(packed, "Rope", domain=INGOT)
    if rope is not None:
        if len(packed.uses()) != 1 or attribute(rope, "num_heads") * attribute(rope, "head_dim") > first:
            return None
        packed = operand(rope)
    linear = _product(packed)
    return None if linear is None else (linear, first)


def _divide_rows(linear: ir.Node, first: int, s: torch.Tensor) -> None:
    for value in linear.inputs[1:]:
        if value is not None:
            _change(value, partial(_rows, first=first, s=s))


def _columns(weight: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (weight.float() * s).to(weight.dtype)


def _rows(weight: torch.Tensor, first: int, s: torch.Tensor) -> torch.Tensor:
    """Rows `first` to `first + len(s)` of a weight [N, K], or of a bias [N], divided by s."""
    result = weight.clone()
    part = result[first : first + len(s)].float()
    result[first : first + len(s)] = (part / s.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    return result


def _divided(weight: torch.Tensor, s: torch.Tensor, offset: float) -> torch.Tensor:
    return ((weight.float() + offset) / s - offset).to(weight.dtype)


def _change(value: ir.Value, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Lets an initialiser hold other numbers of its shape, made when they are asked for."""
    before, shape = value.const_value, value.shape
    assert before is not None and shape is not None

    def evaluate() -> ir.TensorProtocol:
        return ir.tensor(change(to_torch(before)).contiguous(), name=value.name)

    value.const_value = ir.LazyTensor(evaluate, before.dtype, shape, name=value.name, cache=False)


def _own(node: ir.Node, index: int) -> None:
    """Gives the node an initialiser of its own where others read it too."""
    shared = operand(node, index)
    if len(shared.uses()) == 1:
        return
    name = f"{shared.name}.{node.name}"
    copy = ir.Value(name=name, shape=shared.shape, type=shared.type, const_value=shared.const_value)
    assert node.graph is not None
    node.graph.register_initializer(copy)
    node.replace_input_with(index, copy)
