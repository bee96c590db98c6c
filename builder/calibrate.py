"""Quantises the weights that a recipe chooses, layer by layer, and measures what it cost, in two passes over some text.

The first pass runs the model as it is, on held-out text. The second goes through the graph once more with calibration
text and the same held-out text: at each weight it sees what really reaches it (all before it are quantised already),
makes the quantised one, and goes on with that. Its logits on the held-out text are those of the quantised model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch

from ..calibration.accuracy import Accuracy, Layer, compare
from ..calibration.awq import search_clip
from ..calibration.formats import Quantised, round_to_nearest
from ..calibration.gptq import Hessian, gptq
from ..calibration.recipe import Recipe, recipes
from ..engines.errors import BuildError
from .checkpoint import Checkpoint
from .node_major import Windows, run
from .quantise import Chosen, choose

WIDTH, NUM_WINDOWS, HELD_OUT = 512, 64, 16  # tokens of a window; windows to calibrate with, and to check with
FEWEST = 2048  # tokens of text that say anything
SAMPLED = 4  # batches that ranges are searched with
BATCH = 4  # windows in a step: bounds the logits in memory


@dataclass(frozen=True)
class Text:
    """Windows to calibrate with and, taken from between them, windows to check with."""

    calibration: tuple[Windows, ...]
    held_out: tuple[Windows, ...]

    @classmethod
    def read(cls, path: Path, checkpoint: Checkpoint) -> Text:
        """A text file, or JSON Lines whose objects have a `text`. Every fifth window is held out.

        Raises BuildError: no such file, no text in it or too little, a checkpoint without a tokenizer.
        """
        tokens = torch.tensor(_tokens(path, checkpoint), dtype=torch.int32)
        if len(tokens) < FEWEST:
            raise BuildError(f"{path} has {len(tokens)} tokens of text; calibration needs at least {FEWEST}.")
        width = min(WIDTH, len(tokens) // 10, checkpoint.config.max_position_embeddings)
        windows = tokens[: len(tokens) // width * width].view(-1, width)
        # spread over the whole text, whatever its length
        every = windows[torch.linspace(0, len(windows) - 1, min(len(windows), NUM_WINDOWS + HELD_OUT)).long()]
        held = torch.arange(len(every)) % 5 == 4
        return cls(*(tuple(map(Windows, every[part].split(BATCH))) for part in (~held, held)))


def calibrate(
    model: ir.Model, recipe: Recipe, text: Text, on_node: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Chosen], dict[str, Quantised], Accuracy]:
    """What the recipe quantises, the weights that were not just rounded, and the accuracy on held-out text.

    `on_node(done, total)` counts nodes of both passes. Raises BuildError: a recipe that does not fit the model, weights
    or activations that are not finite, with the weight's name.
    """
    chosen = {each.name: each for each in choose(model, recipe)}
    before = run(model, text.held_out, on_node=lambda done, total: on_node(done, 2 * total))
    made: dict[str, Quantised] = {}
    layers: list[Layer] = []
    calibration = text.calibration if recipe.needs_text else ()
    num = len(calibration)

    def weight_of(name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        each = chosen.get(name)
        if each is None:
            return None
        try:
            weight, quantised = _quantised(each, inputs[:num])
        except BuildError as error:
            raise BuildError(f"the weight '{name}' cannot be quantised: {error}") from error
        if each.rule.method != "rtn":
            made[name] = quantised
        result = quantised.dequantise(weight.dtype)
        layers.append(Layer(name, each.rule.spelt(), _error(inputs[num:], weight, result)))
        return result

    after = run(model, calibration + text.held_out, weight_of, lambda done, total: on_node(total + done, 2 * total))
    accuracy = compare(before, after[num:], [windows.tokens for windows in text.held_out])
    return list(chosen.values()), made, replace(accuracy, layers=tuple(layers))


def check(accuracy: Accuracy, recipe: Recipe, model: ir.Model, text: Text) -> None:
    """Raises BuildError if the model became worse than the recipe allows, with the figures and a recipe that passes."""
    if accuracy.passes(recipe):
        return
    for other in sorted(recipes(), key=lambda other: other.perplexity):
        if other.perplexity < recipe.perplexity:
            _, _, found = calibrate(model, other, text)
            if found.passes(recipe):
                advice = f"--quant {other.name} stays within it ({100 * found.rise:+.2f}%)"
                break
    else:
        advice = "no recipe of ingot's stays within it"
    raise BuildError(
        f"the recipe {recipe.name} lets perplexity rise by at most {100 * recipe.perplexity:g}%, but "
        f"{accuracy.table()}\n{advice}; --accept-accuracy builds it all the same."
    )


def _quantised(each: Chosen, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Quantised]:
    weight = each.weight()
    if each.rule.method == "rtn":
        return weight, round_to_nearest(weight, each.format)
    hessian = Hessian()
    for x in inputs:
        hessian.update(x)
    sample = torch.cat(list(inputs[:SAMPLED]))
    clip = search_clip(weight, sample, each.format) if each.format.integer else 1.0
    quantised, _ = gptq(weight, hessian, each.format, each.rule.act_order, clip=clip)
    return weight, quantised


def _error(inputs: Sequence[torch.Tensor], weight: torch.Tensor, quantised: torch.Tensor) -> float:
    """Root mean square of the change of the outputs, over that of the outputs."""
    change, whole = 0.0, 0.0
    for x in inputs:
        y = x.float() @ weight.float().T
        change += float((x.float() @ quantised.float().T - y).square().sum())
        whole += float(y.square().sum())
    return (change / whole) ** 0.5 if whole else 0.0


def _tokens(path: Path, checkpoint: Checkpoint) -> list[int]:
    from tokenizers import Tokenizer

    source = checkpoint.path / "tokenizer.json"
    if not source.is_file():
        raise BuildError(
            f"{checkpoint.path} has no tokenizer.json, so {path} cannot be read for it; add the tokenizer."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"the calibration text {path} cannot be read: {error}.") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_texts(text, path))
    if not text.strip():
        raise BuildError(f"the calibration text {path} is empty; give it some {FEWEST} tokens or more.")
    return Tokenizer.from_file(str(source)).encode(text).ids


def _texts(lines: str, path: Path) -> list[str]:
    found = []
    for number, line in enumerate(lines.splitlines(), 1):
        if line.strip():
            try:
                found.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise BuildError(f'line {number} of {path} is not an object with a "text".') from error
    return found
