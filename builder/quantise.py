"""Quantised weights in the graph: standard DequantizeLinear in front of each Linear, so every target reads the same.

A weight that one Linear reads, and nobody else, becomes `NAME.quantised`, `NAME.scale` and, where there are zero
points, `NAME.zero`.
Weights that something else reads too (a head tied to the embedding) stay as they are. What is rounded to the nearest is
made from the checkpoint when it is written, so no weight is in memory before; what a calibration made is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch

from ..calibration.formats import Format, Quantised, round_to_nearest
from ..calibration.recipe import Recipe, Rule
from ..calibration.scales import Scales
from ..engines.dtypes import DTYPES
from ..engines.errors import BuildError
from ..plugins.dtypes import to_torch
from .node_major import linear_weights
from .passes.graph import size

ELEMENTS = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8_e4m3": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True)
class Chosen:
    """A weight that a recipe stores in fewer bits."""

    value: ir.Value
    rule: Rule

    @property
    def name(self) -> str:
        assert self.value.name
        return self.value.name

    @property
    def format(self) -> Format:
        assert self.rule.format
        return self.rule.format

    def weight(self) -> torch.Tensor:
        """The numbers of the checkpoint, [N, K]."""
        return to_torch(self.value.const_value)


def choose(model: ir.Model, recipe: Recipe) -> list[Chosen]:
    """The weights that the recipe stores in fewer bits, in the order of the graph.

    Raises BuildError: a rule that matches no weight that could be quantised, or a recipe that quantises none.
    """
    weights = list(linear_weights(model).values())
    decided = [(value, recipe.rule(value.name or "")) for value in weights]
    used = {rule for _, rule in decided}
    for rule in recipe.rules:
        if rule not in used and rule.method != "keep":  # a head that is tied to the embedding is kept anyway
            names = ", ".join(value.name or "" for value in weights[:3])
            raise BuildError(
                f"the rule '{rule.match}' of the recipe {recipe.name} decides about no weight of this model; its "
                f"weights are {names}, ..: mend the rule, or take it out."
            )
    chosen = [Chosen(value, rule) for value, rule in decided if rule and rule.method != "keep"]
    if not chosen:
        raise BuildError(f"the recipe {recipe.name} keeps every weight as it is; build without --quant.")
    return chosen


def quantise(model: ir.Model, recipe: Recipe, scales: Scales) -> None:
    """Puts the weights that the recipe chooses into the graph in their formats, in place, as `scales` say.

    Raises BuildError: scales of another recipe or model, or (when the weights are read) a weight that cannot be stored
    so.
    """
    for each in choose(model, recipe):
        _dequantise(model, each, partial(quantised, each, scales))


def quantised(each: Chosen, scales: Scales) -> Quantised:
    """The weight in its format: what a calibration made of it, or rounded. Raises BuildError."""
    made = scales.weights.get(each.name)
    if each.rule.method == "gptq":
        if made is None or made.format != each.format or made.values.shape != tuple(each.value.shape or ()):
            raise BuildError(
                f"the scales have no weight '{each.name}' as {each.rule.spelt()}; they were made with another recipe "
                "or model: calibrate anew."
            )
        return made
    clip = scales.clipping.get(each.name)
    return round_to_nearest(each.weight(), each.format, clip=1.0 if clip is None else clip)


def _dequantise(model: ir.Model, each: Chosen, make: Callable[[], Quantised]) -> None:
    value, form, (rows, columns) = each.value, each.format, (size(each.value, 0), size(each.value, 1))
    groups = -(-columns // form.group) if form.group else 1
    shape = (rows, groups) if form.group else (rows,)
    lazy: dict[str, tuple[ir.DataType, tuple[int, ...], Callable[[], torch.Tensor | None]]] = {
        "quantised": (ELEMENTS[form.dtype], (rows, columns), lambda: make().values),
        "scale": (ir.DataType.FLOAT, shape, lambda: make().scale.repeat_interleave(form.rows or rows, 0)[:rows]),
    }
    if not form.symmetric:
        lazy["zero"] = (ELEMENTS[form.dtype], shape, lambda: make().zero)
    inputs = []
    for kind, (dtype, dims, load) in lazy.items():
        name = f"{each.name}.{kind}"
        initialiser = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        evaluate = partial(_tensor, load, dtype, dims, name)
        initialiser.const_value = ir.LazyTensor(evaluate, dtype, ir.Shape(dims), name=name, cache=False)
        model.graph.register_initializer(initialiser)
        inputs.append(initialiser)
    assert value.dtype is not None
    attributes: dict[str, int] = {"axis": 0, "output_dtype": int(value.dtype)}
    if form.group:
        attributes |= {"axis": 1, "block_size": form.group}
    users = [(node, index) for node, index in value.uses()]
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{each.name}.dequantise")
    result = node.outputs[0]
    result.name, result.shape, result.type = f"{each.name}.dequantised", ir.Shape((rows, columns)), value.type
    first = min((user for user, _ in users), key=list(model.graph).index)
    model.graph.insert_before(first, node)
    for user, index in users:
        user.replace_input_with(index, result)
    del model.graph.initializers[each.name]


def _tensor(
    load: Callable[[], torch.Tensor | None], dtype: ir.DataType, shape: tuple[int, ...], name: str
) -> ir.Tensor:
    tensor = load()
    assert tensor is not None
    tensor = tensor.reshape(shape).contiguous()
    if dtype == ir.DataType.FLOAT8E4M3FN:
        array = tensor.view(torch.uint8).numpy().view(DTYPES["float8_e4m3fn"].numpy)
    else:
        array = tensor.numpy().astype(dtype.numpy())
    return ir.Tensor(array, dtype=dtype, name=name)
