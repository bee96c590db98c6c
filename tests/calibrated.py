"""Recipes that look for something in every way there is, and what a calibration of a small random model finds."""

from families import VOCAB
from ingot.builder.calibration_text import Text
from ingot.builder.journal import Journal
from ingot.builder.quantisation import Quantisation
from ingot.calibration.observers import OBSERVERS
from ingot.calibration.recipe import FOLDER, KV_CACHES, kv_recipes, parse
from ingot.calibration.scales import KINDS
from random_graph import random_graph, random_windows

TEXT = Text((random_windows(2, 16, VOCAB), random_windows(1, 16, VOCAB, 1)), (random_windows(1, 16, VOCAB, 2),))
STATIC = "method: rtn, format: {dtype: int8}, activation: {dtype: int8, rows: 0}"
# all that is looked for in one recipe
MANY = f"""{{perplexity: 10, kv_cache: {{dtype: int8, per: head, observer: mse, centred: true}}, rules: [
  {{match: '*q_proj*', method: awq, format: {{dtype: int4, group: 32, symmetric: false}}}},
  {{match: '*o_proj*', {STATIC}}}, {{match: '*down*', method: gptq, format: {{dtype: fp8_e4m3}}}},
  {{match: '*', {STATIC.replace("rtn", "smoothquant")}, observer: mse}}]}}"""
RECIPES = {
    **{path.stem: parse(path.read_text().replace("128", "32"), path.stem, "") for path in FOLDER.glob("*.yaml")},
    **{f"kv-{name}": kv_recipes()[name] for name in KV_CACHES},
    **{name: parse(f"{{perplexity: 1, rules: [{{match: '*o_proj*', {STATIC}, observer: {name}}}]}}", name, "")
       for name in OBSERVERS},
    "many": parse(MANY, "many", ""),
}  # fmt: skip


def calibrated(recipe, device, journal=None, text=TEXT, graph=None, scales=None, **options):
    """What is found on a device, all that a build needs. scales: that are given."""
    found = Quantisation(recipe, text, True, "a model", device, scales)
    return found.find(graph or random_graph("llama"), journal or Journal.none(), **options)[1]


def tensors(scales):
    """All that was found, by kind and name."""
    found = {(kind, name): x for kind in KINDS for name, x in getattr(scales, kind).items()}
    for name, weight in scales.weights.items():
        found |= {("values", name): weight.values, ("scale", name): weight.scale}
        found |= {} if weight.zero is None else {("zero", name): weight.zero}
    return found
