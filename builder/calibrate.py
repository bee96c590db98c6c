"""Quantises the weights that a recipe chooses, layer by layer, and measures what it cost, in two passes over some text.

The first pass runs the model as it is, on held-out text. The second goes through the graph once more with calibration
text and the same held-out text: at each weight it sees what really reaches it (all before it are quantised already),
makes the quantised one, and goes on with that. Its logits on the held-out text are those of the quantised model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration import QuantisationError
from ..calibration.accuracy import Accuracy, Layer, compare
from ..calibration.awq import search_clip
from ..calibration.formats import round_to_nearest
from ..calibration.gptq import Hessian, gptq
from ..calibration.observers import OBSERVERS
from ..calibration.recipe import Recipe, recipes
from ..calibration.scales import Scales
from ..engines.errors import BuildError
from .calibration_text import Text
from .node_major import run
from .quantise import Chosen, choose, quantised

SAMPLED = 4  # batches that ranges are searched with


def calibrate(
    model: ir.Model,
    recipe: Recipe,
    text: Text,
    on_node: Callable[[int, int], None] = lambda done, total: None,
    scales: Scales | None = None,
) -> tuple[Scales, Accuracy]:
    """What was found for the weights that the recipe quantises, and the accuracy on held-out text.

    scales: of an earlier calibration with this recipe; what they have is not searched for again, and they are added to.
    `on_node(done, total)` counts nodes of both passes. The model stays as it is. Raises BuildError: a recipe that does
    not fit the model, weights or activations that are not finite, with the weight's name.
    """
    scales = Scales() if scales is None else scales
    chosen = {each.name: each for each in choose(model, recipe)}
    before = run(model, text.held_out, on_node=lambda done, total: on_node(done, 2 * total))
    layers: list[Layer] = []
    calibration = text.calibration if recipe.needs_text else ()
    num = len(calibration)

    def replace(name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]] | None:
        each = chosen.get(name)
        if each is None:
            return None
        try:
            reads = _quantised_inputs(each, inputs, num, scales)
            _search(each, reads[:num], scales)
            result = quantised(each, scales).dequantise(inputs[0].dtype)
        except QuantisationError as error:
            raise BuildError(f"the weight '{name}' cannot be quantised: {error}") from error
        change = _error(each.weight(), inputs[num:], result, reads[num:])
        layers.append(Layer(name, each.rule.spelt(), change))
        return result, reads

    after = run(model, calibration + text.held_out, replace, lambda done, total: on_node(total + done, 2 * total))
    accuracy = compare(before, after[num:], [windows.tokens for windows in text.held_out])
    return scales, dataclasses.replace(accuracy, layers=tuple(layers))


def check(accuracy: Accuracy, recipe: Recipe, model: ir.Model, text: Text) -> None:
    """Raises BuildError if the model became worse than the recipe allows, with the figures and a recipe that passes."""
    if accuracy.passes(recipe):
        return
    for other in sorted(recipes(), key=lambda other: other.perplexity):
        if other.perplexity < recipe.perplexity:
            _, found = calibrate(model, other, text)
            if found.passes(recipe):
                advice = f"--quant {other.name} stays within it ({100 * found.rise:+.2f}%)"
                break
    else:
        advice = "no recipe of ingot's stays within it"
    raise BuildError(
        f"the recipe {recipe.name} lets perplexity rise by at most {100 * recipe.perplexity:g}%, but "
        f"{accuracy.table()}\n{advice}; --accept-accuracy builds it all the same."
    )


def _quantised_inputs(each: Chosen, inputs: Sequence[Tensor], num: int, scales: Scales) -> Sequence[Tensor]:
    """What a Linear reads, in the numbers that an engine will have; a static scale is of the first `num` inputs."""
    form = each.rule.activation
    if form is None:
        return inputs
    if each.rule.static and each.name not in scales.activations:
        observer = OBSERVERS[each.rule.observer]()
        for x in inputs[:num]:
            observer.update(x)
        scales.activations[each.name] = observer.scale(form)
    scale = scales.activations[each.name] if each.rule.static else None
    return [round_to_nearest(x, form, scale).dequantise(x.dtype) for x in inputs]


def _search(each: Chosen, inputs: Sequence[Tensor], scales: Scales) -> None:
    """Finds what rounding to the nearest does not say of a weight, and adds it to the scales."""
    if each.rule.method != "gptq" or each.name in scales.weights:
        return
    weight, hessian = each.weight(), Hessian()
    for x in inputs:
        hessian.update(x)
    sample = torch.cat(list(inputs[:SAMPLED]))
    clip = search_clip(weight, sample, each.format) if each.format.integer else 1.0
    scales.weights[each.name], _ = gptq(weight, hessian, each.format, each.rule.act_order, clip=clip)


def _error(weight: Tensor, inputs: Sequence[Tensor], result: Tensor, reads: Sequence[Tensor]) -> float:
    """Root mean square of the change of the outputs, over that of the outputs."""
    change, whole = 0.0, 0.0
    for x, read in zip(inputs, reads, strict=True):
        y = x.float() @ weight.float().T
        change += float((read.float() @ result.float().T - y).square().sum())
        whole += float(y.square().sum())
    return (change / whole) ** 0.5 if whole else 0.0
