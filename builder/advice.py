"""The gate's word: a model that became worse than its recipe allows is refused, with what would have been allowed.

That is measured, not guessed, and costs little beside the calibration that was for nothing: tried are recipes which
round to the nearest, on the text that the refused one was checked with, against the logits that are there already. So
a try is one walk over the held-out text, a sixth of the tokens that GPTQ reads, and what it finds is what a build will.
A KV cache has scales to be found, for which a try reads the calibration text too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from ..calibration.accuracy import Accuracy
from ..calibration.recipe import KV_CACHES, Recipe, kv_recipes, recipes
from ..calibration.scales import Scales
from ..engines.errors import BuildError
from .calibrate import calibrate
from .calibration_text import Text
from .journal import Journal
from .node_major import OnNode
from .quantise import choose


def check(
    accuracy: Accuracy,
    recipe: Recipe,
    model: ir.Model,
    text: Text | None,
    scales: Scales,
    journal: Journal,
    device: str = "cpu",
    on_node: OnNode = lambda done, total, name: None,
) -> None:
    """Raises BuildError if the model became worse than the recipe allows, with the figures and a recipe that passes.

    scales: that the recipe was calibrated to. journal: of that calibration; what is advised is kept there.
    """
    if accuracy.passes(recipe):
        return
    advice = journal.remembered("advice")
    if advice is None:
        advice = _advice(recipe, model, text, scales, journal, device, on_node) if text else (
            "pass --calibration-data to find a recipe that does not"
        )  # fmt: skip
        journal.remember("advice", advice)
    raise BuildError(
        f"the recipe {recipe.name} lets perplexity rise by at most {100 * recipe.perplexity:g}%, but "
        f"{accuracy.table()}\n{advice}; --accept-accuracy builds it all the same."
    )


def _advice(
    recipe: Recipe, model: ir.Model, text: Text, scales: Scales, journal: Journal, device: str, on_node: OnNode
) -> str:
    for option, other in _alternatives(recipe):
        try:
            choose(model, other)
        except BuildError:
            continue  # a format that does not fit the model
        without_kv = other.rules == recipe.rules and other.kv_cache is None
        found = scales if without_kv else Scales()  # of the same weights: nothing is searched anew
        seen = text if other.kv_cache else replace(text, calibration=())
        _, accuracy = calibrate(model, other, seen, on_node, found, device=device, journal=journal.trial())
        if accuracy.passes(recipe):
            return f"{option} stays within it ({100 * accuracy.rise:+.2f}%)"
    searched = ", ".join(other.name for other in recipes() if other.needs_text and other.name != recipe.name)
    tried = "" if not recipe.rules else f"; {searched}, which search, were not tried"
    return f"nothing of ingot's that rounds to the nearest stays within it{tried}"


def _alternatives(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What may be less harmful, by the option that asks for it, the likeliest first."""
    if not recipe.rules:
        for name in sorted(KV_CACHES, key=lambda name: KV_CACHES[name].dtype != "int8"):
            if KV_CACHES[name] != recipe.kv_cache:
                yield f"--kv-cache {name}", kv_recipes()[name]
        return
    if recipe.kv_cache:
        yield "the same without its KV cache", replace(recipe, kv_cache=None)
    found = [other for other in recipes() if not other.needs_text and other.name != recipe.name]
    for other in sorted(found, key=lambda other: (other.perplexity, any(rule.activation for rule in other.rules))):
        yield f"--quant {other.name}" + (" without its KV cache" if recipe.kv_cache else ""), other
