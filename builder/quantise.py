"""The quantised graph: standard DequantizeLinear in front of what reads a weight, so every target reads the same.

A weight becomes `NAME.quantised`, `NAME.scale` and, where there are zero points, `NAME.zero`. Three kinds can: the
weight of one Linear; the table of an embedding, of which only the rows that a step gathers are taken back (a head that
is tied to it reads the same stored numbers); the weights of Experts. What is rounded to the nearest is made from the
checkpoint when it is written, so no weight is in memory before; what a calibration made is in its `Scales`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import onnx_ir as ir
import torch

from ..calibration import QuantisationError
from ..calibration.formats import Format, Quantised, round_to_nearest
from ..calibration.recipe import SMOOTHS, Recipe, Rule
from ..calibration.scales import Scales
from ..engines.errors import BuildError
from ..plugins.dtypes import to_torch
from .node_major import linear_weights
from .passes.graph import attribute, dims, nodes, operand, size
from .passes.quantise_activation import quantise_activation
from .passes.quantise_weight import quantise_experts, quantise_linear, quantise_table
from .passes.smoothing import Site


@dataclass(frozen=True)
class Chosen:
    """A weight that a recipe stores in fewer bits. kind: `linear`, `table` (of an embedding) or `experts`."""

    value: ir.Value
    rule: Rule
    kind: str = "linear"

    @property
    def name(self) -> str:
        assert self.value.name
        return self.value.name

    @property
    def format(self) -> Format:
        assert self.rule.format
        return self.rule.format

    @property
    def reader(self) -> ir.Node:
        """The one Linear, or the first of the nodes that read it."""
        return next(iter(self.value.uses())).node

    def weight(self) -> torch.Tensor:
        """The numbers of the checkpoint, [N, K]; of experts [E, N, K], or as `Experts` has them transposed."""
        return to_torch(self.value.const_value)


def choose(model: ir.Model, recipe: Recipe) -> list[Chosen]:
    """The weights that the recipe stores in fewer bits: those of Linears in the order of the graph, and others.

    A rule that matches weights of Linears or Experts says nothing about embeddings: `*` does not mean them. Experts
    read activations as they are, whatever their rule says of them.
    Raises BuildError: a rule that decides about no weight, or asks for what a weight cannot be stored as, or a recipe
    that quantises none.
    """
    weights = {name: (value, "linear") for name, value in linear_weights(model).items()}
    weights |= {value.name or "": (value, "experts") for value in _experts(model)}
    decided = [(*weight, recipe.rule(name)) for name, weight in weights.items()]
    own = tuple(rule for rule in recipe.rules if not any(fnmatchcase(name, rule.match) for name in weights))
    for value in _tables(model):
        rule = next((rule for rule in own if fnmatchcase(value.name or "", rule.match)), None)
        decided.append((value, "table", rule))
    used = {rule for *_, rule in decided}
    for rule in recipe.rules:
        if rule not in used and rule.method != "keep":  # a head that is tied to the embedding is kept anyway
            names = ", ".join(value.name or "" for value, *_ in decided[:3])
            raise BuildError(
                f"the rule '{rule.match}' of the recipe {recipe.name} decides about no weight of this model; its "
                f"weights are {names}, ..: mend the rule, or take it out."
            )
    chosen = [Chosen(value, rule, kind) for value, kind, rule in decided if rule and rule.method != "keep"]
    if not chosen and recipe.kv_cache is None:
        raise BuildError(f"the recipe {recipe.name} keeps every weight as it is; build without --quant.")
    for each in chosen:
        _check(each, recipe)
    return chosen


def sites(chosen: list[Chosen]) -> list[Site]:
    """Where the recipe smooths: the Linears that read the same x by the same rule, in the order of the graph."""
    groups: dict[tuple[ir.Value, Rule], list[ir.Node]] = {}
    for each in chosen:
        if each.kind == "linear" and each.rule.method in SMOOTHS:
            groups.setdefault((operand(each.reader), each.rule), []).append(each.reader)
    return [Site(x, tuple(linears)) for (x, _), linears in groups.items()]


def smooth(model: ir.Model, recipe: Recipe, scales: Scales) -> None:
    """Smooths the graph in place, as `scales.smoothing` says. Raises BuildError: scales of another recipe or model."""
    for site in sites(choose(model, recipe)):
        s = scales.smoothing.get(site.names[0])
        if s is None or s.shape != dims(site.x)[-1:]:
            raise _others(site.names[0], "smoothing")
        if not bool((s == 1).all()):
            site.apply(s)


def quantise(model: ir.Model, recipe: Recipe, scales: Scales) -> None:
    """Puts weights and activations into the formats that the recipe has for them, in place, as `scales` say.

    Raises BuildError: scales of another recipe or model, or (when the weights are read) a weight that cannot be stored
    so.
    """
    smooth(model, recipe, scales)
    chosen = choose(model, recipe)
    quantise_others(model, chosen)
    for each in chosen:
        if each.kind != "linear":
            continue
        linear, form = each.reader, each.rule.activation
        if each.rule.method == "gptq":
            quantised(each, scales)  # refuses what does not fit now, not when it is written
        else:
            _clip(each, scales)
        quantise_linear(model, each.value, each.format, partial(quantised, each, scales))
        if form is not None:
            scale = scales.activations.get(each.name)
            if each.rule.static and (scale is None or scale.dim()):
                raise _others(each.name, "scale of activations")
            quantise_activation(model, linear, form, scale if each.rule.static else None)


def quantise_others(model: ir.Model, chosen: list[Chosen]) -> None:
    """Quantises, in place, what needs no calibration since it is rounded to the nearest: tables and experts."""
    for each in chosen:
        if each.kind == "table":
            quantise_table(model, each.value, each.format, partial(_rounded, each))
        elif each.kind == "experts":
            quantise_experts(model, each.value, each.format, each.weight)


def quantised(each: Chosen, scales: Scales) -> Quantised:
    """The weight in its format: what a calibration made of it, or rounded. Raises BuildError."""
    made = scales.weights.get(each.name)
    if each.rule.method == "gptq":
        if made is None or made.format != each.format or made.values.shape != tuple(each.value.shape or ()):
            raise _others(each.name, "weight")
        return made
    return _rounded(each, _clip(each, scales))


def _clip(each: Chosen, scales: Scales) -> float | torch.Tensor:
    """What a calibration found of the range to cover. Raises BuildError: scales of another recipe or model."""
    clip = scales.clipping.get(each.name)
    if clip is not None and clip.shape != each.format.scale_shape(size(each.value, 0), size(each.value, 1)):
        raise _others(each.name, "clipping")
    return 1.0 if clip is None else clip


def _rounded(each: Chosen, clip: float | torch.Tensor = 1.0) -> Quantised:
    try:
        return round_to_nearest(each.weight(), each.format, clip=clip)
    except QuantisationError as error:
        raise BuildError(f"the weight '{each.name}' cannot be quantised: {error}") from error


def _others(name: str, what: str) -> BuildError:
    return BuildError(
        f"the scales have no {what} for '{name}' as this recipe and model want it; they were made with others: "
        "calibrate anew."
    )


def _check(each: Chosen, recipe: Recipe) -> None:
    rule, where = each.rule, f"the rule '{each.rule.match}' of the recipe {recipe.name}"
    if each.kind == "table" and (
        rule.method != "rtn"
        or rule.activation
        or (each.format.dtype, each.format.group, each.format.rows) != ("int8", 0, 1)
    ):
        raise BuildError(
            f"{where} stores the embedding '{each.name}' by {rule.spelt()}; an embedding can be stored by rtn in int8 "
            "with a scale for each row, or kept."
        )
    if each.kind == "experts" and rule.method != "rtn":
        raise BuildError(
            f"{where} stores the experts' weight '{each.name}' by {rule.method}, which needs what each expert reads; "
            "give experts a rule of their own before it, with the method rtn or keep."
        )
    try:
        columns = size(each.value, 1) if each.kind != "experts" else size(each.value, 1 if _transposed(each) else 2)
        each.format.scale_shape(1, columns)
        if rule.activation:
            rule.activation.scale_shape(1, columns)
    except QuantisationError as error:
        raise BuildError(f"the weight '{each.name}' cannot be quantised as {where} wants it: {error}") from error
    if each.format.dtype == "int4" and int(dims(each.value)[-1] or 0) % 2:
        raise BuildError(
            f"{where} stores '{each.name}' in int4, two numbers in a byte, but it has an odd number of columns."
        )


def _transposed(each: Chosen) -> bool:
    return bool(attribute(each.reader, "transposed", 0))


def _tables(model: ir.Model) -> Iterator[ir.Value]:
    """Tables that Gather takes rows of, and that nobody else reads but a Linear (a tied head)."""
    for value in model.graph.initializers.values():
        uses = list(value.uses())
        gathers = [use for use in uses if use.node.op_type == "Gather"]
        rows = all(
            use.idx == 0 and attribute(use.node, "axis", 0) == 0 and len(dims(operand(use.node, 1))) == 1
            for use in gathers
        )
        others = all(use.node.op_type == "Linear" and use.idx == 1 for use in uses if use not in gathers)
        if gathers and rows and others and len(dims(value)) == 2 and value.dtype and value.dtype.is_floating_point():
            yield value


def _experts(model: ir.Model) -> Iterator[ir.Value]:
    for node in nodes(model, "Experts"):
        for value in node.inputs[3:5]:
            if value is not None and value.is_initializer() and len(value.uses()) == 1:
                yield value
