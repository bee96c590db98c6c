"""`--quant` in a build: what was asked for, the quantised graph, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.recipe import Recipe
from ..engines.errors import BuildError
from .calibrate import Text, calibrate, check
from .quantise import quantise

if TYPE_CHECKING:
    import onnx_ir as ir

    from . import BuildConfig
    from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Quantisation:
    """A recipe and the text it is calibrated and checked with."""

    recipe: Recipe
    data: Path
    text: Text
    accept: bool  # whatever the accuracy is

    @classmethod
    def of(cls, config: BuildConfig, checkpoint: Checkpoint) -> Quantisation | None:
        """What the build asks for; None: nothing. Raises BuildError: options that contradict each other, a bad recipe
        or text."""
        if not config.quant:
            for option, given in (("--calibration-data", config.calibration_data),
                                  ("--accept-accuracy", config.accept_accuracy)):  # fmt: skip
                if given:
                    raise BuildError(f"{option} is for quantised builds; pass --quant RECIPE too, or leave it out.")
            return None
        recipe = Recipe.open(config.quant)
        if config.target != "cpu":
            raise BuildError(
                f"the recipe {recipe.name} was asked for with --target {config.target}, which has no kernels for "
                "quantised weights yet; build for --target cpu, or leave out --quant."
            )
        if not config.calibration_data:
            raise BuildError(
                f"the recipe {recipe.name} needs text, since every quantised build is checked on some; pass "
                '--calibration-data FILE (text, or JSON Lines with a "text" in each).'
            )
        data = Path(config.calibration_data)
        return cls(recipe, data, Text.read(data, checkpoint), config.accept_accuracy)

    def apply(self, graph: ir.Model, on_node: Callable[[int, int], None] | None = None) -> dict[str, Any]:
        """Quantises the graph in place; returns what the manifest keeps.

        Raises BuildError: the model became worse than the recipe's bound, or as `calibrate` does.
        """
        report = on_node or (lambda done, total: None)
        scales, accuracy = calibrate(graph, self.recipe, self.text, lambda done, total, name: report(done, total))
        if not self.accept:
            check(accuracy, self.recipe, graph, self.text)
        quantise(graph, self.recipe, scales)
        return {
            "recipe": self.recipe.name, "rules": [asdict(rule) for rule in self.recipe.rules],
            "bound": self.recipe.perplexity, "accepted": self.accept and not accuracy.passes(self.recipe),
            "text": self.text.digest, "accuracy": accuracy.describe(),
        }  # fmt: skip
