"""`--quant` in a build, and `ingot calibrate`: what was asked for, what is found, and what the manifest says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.accuracy import Accuracy
from ..calibration.recipe import KV_CACHES, Recipe, kv_recipes
from ..calibration.scales import Scales
from ..engines.errors import BuildError
from . import OF_QUANTISED, BuildConfig
from .advice import check
from .calibrate import calibrate
from .calibration_text import Text
from .fingerprint import fingerprint
from .journal import Journal
from .kv_cache import quantise_pools
from .node_major import OnNode, linear_weights
from .quantise import quantise
from .record import versions

if TYPE_CHECKING:
    import onnx_ir as ir

    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Quantisation:
    """A recipe, and the text it is calibrated and checked with or the scales that were found so."""

    recipe: Recipe
    text: Text | None
    accept: bool  # whatever the accuracy is
    model: str  # fingerprint of the checkpoint
    device: str = "cpu"
    scales: Scales | None = None

    @classmethod
    def of(cls, config: BuildConfig, checkpoint: Checkpoint) -> Quantisation | None:
        """What the build asks for; None: nothing. Raises BuildError: options that contradict each other, a bad recipe
        or text, scales of another model or recipe, a device that is not there."""
        if config.kv_cache and config.kv_cache not in KV_CACHES:
            raise BuildError(f"the KV cache is {config.kv_cache!r}; pass --kv-cache one of {', '.join(KV_CACHES)}.")
        if not config.quant and not config.kv_cache:
            if given := config.given(OF_QUANTISED):
                raise BuildError(f"{given[0]} is for quantised builds; pass --quant RECIPE too, or leave it out.")
            return None
        if config.kv_cache and not config.calibration_data and not config.scales:
            raise BuildError(
                f"--kv-cache {config.kv_cache} needs text: its scales are calibrated on some, and have no default; "
                "pass --calibration-data with a text file, JSON Lines or a dataset of the hub."
            )
        recipe = Recipe.open(config.quant) if config.quant else kv_recipes()[config.kv_cache]
        if config.kv_cache:
            recipe = replace(recipe, kv_cache=KV_CACHES[config.kv_cache])
        if not config.calibration_data and not config.scales:
            raise BuildError(
                f"the recipe {recipe.name} needs text, since every quantised build is checked on some; pass "
                '--calibration-data with a file (text, or JSON Lines with a "text" in each) or a dataset of the hub.'
            )
        text, size = None, (config.calibration_tokens, config.calibration_width)
        if config.calibration_data:
            text = Text.read(config.calibration_data, checkpoint, *size)
        own = cls(recipe, text, config.accept_accuracy, fingerprint(checkpoint), _device(config.calibration_device))
        return replace(own, scales=own._open(Path(config.scales))) if config.scales else own

    def journal(self, out: Path, dtype: str, on_note: Callable[[str], None] | None = None) -> Journal:
        """What the calibration keeps beside its output, for as long as it takes; where there is none, in memory."""
        if self.text is None or self.scales is not None:
            return Journal.none()
        about = {**self._about(), "dtype": dtype, "versions": versions()}
        out = out.absolute()
        return Journal(out.with_name(f"{out.name}.calibration"), about, on_note or (lambda sentence: None))

    def find(
        self, graph: ir.Model, journal: Journal, on_node: OnNode = lambda done, total, name: None
    ) -> tuple[Recipe, Scales]:
        """What the graph's weights are stored as, and the scales; their `about` says what for, and the accuracy.

        Raises BuildError as `calibrate` does.
        """
        recipe, scales, mixed = self.recipe, self.scales or journal.scales, None
        if recipe.mixed:
            mixed = self._mixed(graph, journal, on_node)
            recipe = recipe.mixing(mixed, list(linear_weights(graph)))
        if self.text is None:  # measured when the scales were found, with the same numbers
            return recipe, scales
        scales, accuracy = calibrate(graph, recipe, self.text, on_node, scales, device=self.device, journal=journal)
        scales.about = {**self._about(), "accuracy": accuracy.describe(), "versions": versions()}
        if mixed is not None:
            scales.about["mixed"] = mixed
        return recipe, scales

    def apply(
        self,
        graph: ir.Model,
        recipe: Recipe,
        scales: Scales,
        journal: Journal,
        on_node: OnNode = lambda done, total, name: None,
    ) -> dict[str, Any]:
        """Quantises the graph in place; returns what the manifest keeps. `on_node` counts while others are tried.

        Raises BuildError: the model became worse than the recipe's bound.
        """
        accuracy = Accuracy.of(scales.about["accuracy"])
        if not self.accept:
            check(accuracy, recipe, graph, self.text, scales, journal, self.device, on_node)
        quantise(graph, recipe, scales)
        kv = recipe.kv_cache
        if kv:
            quantise_pools(graph, kv.dtype, scales.kv)
        return {
            "recipe": recipe.name, "rules": [asdict(rule) for rule in recipe.rules],
            "bound": recipe.perplexity, "accepted": self.accept and not accuracy.passes(recipe),
            "kv_cache": kv and asdict(kv), "text": scales.about["text"], "accuracy": accuracy.describe(),
        }  # fmt: skip

    def _about(self) -> dict[str, Any]:
        """What the results depend on, as JSON."""
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        return {"model": self.model, "recipe": recipe, "text": self.text.digest if self.text else ""}

    def _open(self, path: Path) -> Scales:
        scales, about = Scales.open(path), self._about()
        for what, key, advice in (
            ("model", "model", "give the checkpoint that they were found for"),
            ("recipe", "recipe", f"give {_options(scales.about.get('recipe', {}))}"),
        ):
            if scales.about.get(key) != about[key]:
                raise BuildError(
                    f"the scales in {path} are of another {what}; {advice}, or find others with `ingot calibrate`."
                )
        if self.text is None and not {"accuracy", "text"} <= scales.about.keys():
            raise BuildError(f"{path} does not say how accurate its scales are; pass --calibration-data to measure it.")
        return scales

    def _mixed(self, graph: ir.Model, journal: Journal, on_node: OnNode) -> dict[str, int]:
        """Which weights have something else than their rule: found before, or searched for now."""
        from .sensitivity import mix

        assert self.recipe.mixed
        if self.scales:
            mixed, kinds = self.scales.about.get("mixed", {}), range(len(self.recipe.mixed.instead))
            if not mixed.keys() <= linear_weights(graph).keys() or not all(i in kinds for i in mixed.values()):
                raise BuildError("the scales choose weights for `mixed` that there are not; calibrate anew.")
            return dict(mixed)
        assert self.text
        found = journal.remembered("mixed")
        if found is None:
            found = mix(graph, self.recipe, self.text.calibration, on_node, self.device)
            journal.remember("mixed", found)
        return found


def _options(recipe: Mapping[str, Any]) -> str:
    """Those of a build that ask for a recipe, of which this is the description in a file of scales."""
    name, kv = recipe.get("name", ""), recipe.get("kv_cache")
    cache = next((known for known, each in KV_CACHES.items() if asdict(each) == kv), "")
    alone = name in (each.name for each in kv_recipes().values())
    return " ".join([*([] if alone else [f"--quant {name}"]), *([f"--kv-cache {cache}"] if cache else [])])


def _device(asked: str) -> str:
    import torch

    there = torch.cuda.is_available()
    if asked not in ("auto", "cpu", "cuda"):
        raise BuildError(f"the calibration device {asked} was asked for; expected auto, cpu or cuda.")
    if asked == "cuda" and not there:
        raise BuildError("--calibration-device cuda was asked for, but there is no GPU here; pass cpu or auto.")
    return "cuda" if asked != "cpu" and there else "cpu"
