"""The stored numbers of a checkpoint that is quantised already, put into the graph as a recipe's would be.

Passes saw weights in the activation dtype, which nobody has read by now. A weight that one Linear reads becomes
DequantizeLinear of the rows it is made of, in the stored numbers and with a scale for each row, so that q|k|v of three
scales for a tensor stay what they are. Columns in another order (act-order) are met by a Gather of what the Linear
reads. A weight that anything else reads (an embedding, experts, a tied head) is left in the activation dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration.formats import Format
from ..engines.errors import BuildError
from . import OF_QUANTISED, BuildConfig
from .kv_cache import quantise_pools
from .node_major import linear_weights
from .passes.graph import dims, operand
from .passes.packed_weights import Part, parts_of, stored_as
from .passes.quantise_activation import quantise_activation
from .passes.quantise_weight import quantise_linear
from .passes.verify import verify
from .quantised_checkpoints import QuantisedWeights, StoredModule


def check_options(config: BuildConfig, weights: QuantisedWeights) -> None:
    """Raises BuildError: options of a build that a checkpoint with quantised weights has no use for."""
    already = f"{config.model} is quantised already ({weights.method})"
    if config.quant:
        raise BuildError(
            f"{already}, and --quant {config.quant} would round it a second time; leave out --quant, or give the "
            "unquantised checkpoint."
        )
    if given := config.given(("kv_cache", *OF_QUANTISED)):
        raise BuildError(f"{already}, so there is nothing to calibrate or to compare it with; leave out {given[0]}.")


def keep_stored(model: ir.Model, weights: QuantisedWeights) -> dict[str, Any]:
    """Puts the stored numbers into the optimised graph, in place; returns what the manifest keeps.

    Raises BuildError: a weight that an engine cannot hold so; when the weights are read, one that is damaged.
    """
    kept: set[str] = set()
    for value in list(linear_weights(model).values()):
        parts = parts_of(value)
        modules = [stored_as(part) for part in parts]
        if None in modules or any(part.transposed for part in parts):
            continue
        rows = _Rows(parts, tuple(modules))
        _check(rows)
        linear = next(use.node for use in value.uses())
        if modules[0].order is not None:
            _gather_columns(model, linear, modules[0].order)
        if modules[0].activation is not None:
            scale = modules[0].input_scale
            number = None if scale is None else torch.tensor(scale)
            quantise_activation(model, linear, modules[0].activation, number)
        quantise_linear(model, value, rows.format, partial(_itself, rows))
        kept.update(module.name for module in modules)
    if weights.kv:
        quantise_pools(model, weights.kv.dtype, weights.kv.scales)
    verify(model, keep_stored.__name__)
    others = sorted(weights.modules.keys() - kept)
    return {
        "checkpoint": weights.method, "scheme": weights.spelt(), "weights": len(kept),
        "dequantised": {"weights": len(others), "for example": others[:3]},
        "kv_cache": weights.kv and {"dtype": weights.kv.dtype},
    }  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """`Quantised` of rows of several modules of one kind; each tensor is put together when it is asked for."""

    parts: tuple[Part, ...]
    modules: tuple[StoredModule, ...]

    @property
    def format(self) -> Format:
        first = self.modules[0].format
        return Format(first.dtype, first.group, rows=1, symmetric=first.symmetric)

    @property
    def values(self) -> Tensor:
        """[N, K]."""
        length, columns = sum(len(part.rows) for part in self.parts), self.modules[0].shape[1]
        dtype = torch.int8 if self.format.integer else torch.float8_e4m3fn
        whole, start = torch.empty(length, columns, dtype=dtype), 0
        for part, module in zip(self.parts, self.modules, strict=True):  # one by one: one weight is in memory, and this
            whole[start : start + len(part.rows)] = _take(module.values(), part)
            start += len(part.rows)
        return whole

    @property
    def scale(self) -> Tensor:
        """[N, G]."""
        return self._each_row([module.scale() for module in self.modules])

    @property
    def zero(self) -> Tensor | None:
        """[N, G]."""
        found = [module.zero() for module in self.modules if module.zero is not None]
        return self._each_row(found) if found else None

    def _each_row(self, blocks: list[Tensor]) -> Tensor:
        rows = []
        for part, module, numbers in zip(self.parts, self.modules, blocks, strict=True):
            height = module.format.rows or module.shape[0]
            rows.append(numbers[torch.from_numpy(part.rows) // height])
        return torch.cat(rows)


def _itself(rows: _Rows) -> _Rows:
    return rows


def _take(numbers: Tensor, part: Part) -> Tensor:
    whole = len(part.rows) == len(numbers) and bool((torch.from_numpy(part.rows).diff() == 1).all())
    if whole:
        return numbers
    rows = torch.from_numpy(part.rows)
    return numbers.view(torch.int8)[rows].view(numbers.dtype)  # torch does not index 8-bit floats everywhere


def _check(rows: _Rows) -> None:
    module = rows.modules[0]
    if module.format.dtype == "int4" and module.shape[1] % 2:
        raise BuildError(
            f"the weight '{module.name}' has {module.shape[1]} columns of int4, expected an even number; give the "
            "unquantised checkpoint"
        )


def _gather_columns(model: ir.Model, linear: ir.Node, order: Tensor) -> None:
    """Lets the Linear read the columns of x in the order of its weight's; Linears of one order share the Gather."""
    x = operand(linear)
    for node in x.consumers():
        if node.op_type == "Gather" and node.inputs[0] is x and _constant(node.inputs[1]) == order.tolist():
            linear.replace_input_with(0, node.outputs[0])
            return
    index = ir.Value(name=f"{linear.name}.order", shape=ir.Shape(order.shape), type=ir.TensorType(ir.DataType.INT64))
    index.const_value = ir.tensor(order, name=index.name)
    model.graph.register_initializer(index)
    node = ir.node("Gather", [x, index], {"axis": 1}, name=f"{linear.name}.gather_columns")
    y = node.outputs[0]
    y.name, y.shape, y.type = f"{linear.name}.x_ordered", ir.Shape(dims(x)), x.type
    producer = x.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    linear.replace_input_with(0, y)


def _constant(value: ir.Value | None) -> list[int] | None:
    tensor = None if value is None or not value.is_initializer() else value.const_value
    return None if tensor is None else tensor.numpy().tolist()
