"""Finds how the weights that a recipe chooses are quantised, layer by layer, and measures what it cost, in two passes.

The first pass runs the model as it is: on held-out text, and where the recipe smooths on calibration text too, which
says how. The second goes through the smoothed graph with both texts: at each weight it sees what really reaches it
(all before it are quantised already), puts weight and activations into their formats, and goes on with that. Its logits
on the held-out text are those of the quantised model.

Searches run on the device, where what a node reads (`node_major.OnDevice`) and its weight lie for as long as they take.
The graph, scales (`Scales.keep`) and the numbers that an engine will have are the host's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration import QuantisationError
from ..calibration.accuracy import Accuracy, Layer, compare
from ..calibration.awq import search_clip, search_scales
from ..calibration.formats import check_finite, round_to_nearest
from ..calibration.gptq import Hessian, gptq
from ..calibration.observers import OBSERVERS, AbsMax
from ..calibration.recipe import Recipe
from ..calibration.scales import Scales
from ..calibration.smoothquant import search_smoothing
from ..engines.errors import BuildError
from .calibration_text import Text
from .journal import Journal
from .kv_cache import PoolScales
from .node_major import OnDevice, OnNode, run
from .passes.smoothing import Site
from .quantise import Chosen, choose, quantise_others, quantised, sites, smooth

SAMPLED = 4096  # tokens that searches try their candidates with; SmoothQuant's, whose every try is a product, fewer
SAMPLED_TO_SMOOTH = 1024


def calibrate(
    model: ir.Model,
    recipe: Recipe,
    text: Text,
    on_node: OnNode = lambda done, total, name: None,
    scales: Scales | None = None,
    *,
    device: str = "cpu",
    journal: Journal | None = None,
) -> tuple[Scales, Accuracy]:
    """What was found for the weights that the recipe quantises, and the accuracy on held-out text.

    scales: of an earlier calibration with this recipe; what they have is not searched for again, and they are added to.
    device: where the node at hand is computed. journal: what is found goes there, and what is there counts as found.
    `on_node(done, total, name)` counts nodes of both passes. The model stays as it is. Raises BuildError: a recipe that
    does not fit the model, weights or activations that are not finite, with the weight's name.
    """
    journal = journal or Journal.none()
    if journal.accuracy:
        return journal.scales, journal.accuracy
    scales = journal.scales if scales is None else scales
    calibration = text.calibration if recipe.needs_text else ()
    chosen = choose(model, recipe)
    smoothed = {name: site for site in sites(chosen) for name in site.names}
    weights = {each.name: each for each in chosen}
    seen = calibration if smoothed else ()

    def look(name: str, inputs: OnDevice) -> None:
        _check_finite(name, inputs)
        if name in smoothed and name not in scales.smoothing:
            site = smoothed[name]
            s = _smoothing(site, [weights[name] for name in site.names], inputs[: len(seen)], device)
            s = site.fit(s.cpu())  # to what the graph holds, on the host
            scales.smoothing.update(dict.fromkeys(site.names, s))
            journal.add(scales)

    before = journal.walk("before")
    if not before.complete:
        batches = (*seen, *text.held_out)
        before.keep(run(model, batches, look, lambda done, total, name: on_node(done, 2 * total, name),
                        unread=len(seen), device=device, snapshots=before))  # fmt: skip
    prepared = model.clone()
    smooth(prepared, recipe, scales)
    weights = {each.name: each for each in choose(prepared, recipe)}
    quantise_others(prepared, list(weights.values()))
    num = len(calibration)

    def replace(name: str, inputs: OnDevice) -> tuple[Tensor, Sequence[Tensor]] | None:
        _check_finite(name, inputs)
        each = weights.get(name)
        if each is None:
            return None
        try:
            weight, reads = each.weight().to(device), _quantised_inputs(each, inputs, num, scales, device)
            _search(each, weight, reads[:num], scales)
            result = quantised(each, scales).to(device).dequantise(weight.dtype)
            change = _error(weight, inputs[num:], result, reads[num:])
        except QuantisationError as error:
            raise BuildError(f"the weight '{name}' cannot be quantised: {error}") from error
        journal.add(scales, Layer(name, each.rule.spelt(), change))
        return result, reads

    pools = PoolScales(recipe.kv_cache, num, scales, journal) if recipe.kv_cache else None
    batches = (*calibration, *text.held_out)
    after = run(pools.graph(prepared) if pools else prepared, batches, replace,
                lambda done, total, name: on_node(total + done, 2 * total, name), pools,
                unread=num, device=device, snapshots=journal.walk("after"))  # fmt: skip
    accuracy = compare(before.logits(), after, [windows.tokens for windows in text.held_out])
    measured = (*weights, *scales.kv)
    accuracy = dataclasses.replace(
        accuracy, layers=tuple(journal.layers[name] for name in measured if name in journal.layers)
    )
    journal.finish(accuracy)
    return scales, accuracy


def _quantised_inputs(each: Chosen, inputs: OnDevice, num: int, scales: Scales, device: str) -> OnDevice:
    """What a Linear reads, in the numbers that an engine will have; a static scale is of the first `num` inputs."""
    form = each.rule.activation
    if form is None:
        return inputs
    if each.rule.static and each.name not in scales.activations:
        observer = OBSERVERS[each.rule.observer]()
        for x in inputs[:num]:
            observer.update(x)
        scales.keep("activations", each.name, observer.scale(form))
    scale = scales.activations[each.name].to(device) if each.rule.static else None
    return inputs.changed(lambda x: round_to_nearest(x, form, scale).dequantise(x.dtype))


def _smoothing(site: Site, members: Sequence[Chosen], inputs: OnDevice, device: str) -> Tensor:
    """s [K], on the device, that serves all Linears of the site best, by the method of their rule."""
    rule, weights = members[0].rule, [each.weight().to(device) for each in members]
    sample = _sample(inputs, SAMPLED if rule.method == "awq" else SAMPLED_TO_SMOOTH)
    if rule.method == "awq":
        mean_abs = sum((x.float().abs().sum(0) for x in inputs), torch.zeros(sample.shape[1], device=device))
        return search_scales(weights, sample, site.share(mean_abs / inputs.num_rows), members[0].format)
    assert rule.activation
    largest = AbsMax(channels=True)
    for x in inputs:
        largest.update(x)
    return search_smoothing(weights, sample, rule.activation, members[0].format, largest.absmax, site.share)


def _search(each: Chosen, weight: Tensor, inputs: OnDevice, scales: Scales) -> None:
    """Finds what rounding to the nearest does not say of a weight [N, K], and adds it to the scales."""
    method, name = each.rule.method, each.name
    if method == "awq" and name not in scales.clipping and each.format.integer:
        scales.keep("clipping", name, search_clip(weight, _sample(inputs), each.format))
    elif method == "gptq" and name not in scales.weights:
        hessian = Hessian()
        for x in inputs:
            hessian.update(x)
        clip = search_clip(weight, _sample(inputs), each.format) if each.format.integer else 1.0
        scales.keep("weights", name, gptq(weight, hessian, each.format, each.rule.act_order, clip=clip)[0])


def _sample(inputs: OnDevice, most: int = SAMPLED) -> Tensor:
    """Rows from all of the text, at most so many: what searches try their candidates with."""
    step = -(-inputs.num_rows // most)
    return torch.cat([x[::step] for x in inputs])


def _check_finite(name: str, inputs: OnDevice) -> None:
    for x in inputs:
        try:
            check_finite(x, f"what the weight '{name}' reads")
        except QuantisationError as error:
            raise BuildError(
                f"{error}; it is the first in the model, so look at the checkpoint's weights before it, or build in "
                "another --dtype."
            ) from error


def _error(weight: Tensor, inputs: OnDevice, result: Tensor, reads: OnDevice) -> float:
    """Root mean square of the change of the outputs, over that of the outputs."""
    change, whole = 0.0, 0.0
    for x, read in zip(inputs, reads, strict=True):
        y = x.float() @ weight.float().T
        change += float((read.float() @ result.float().T - y).square().sum())
        whole += float(y.square().sum())
    return (change / whole) ** 0.5 if whole else 0.0
