"""Quantises the weights that a recipe chooses, layer by layer, and measures what it cost, in two passes over some text.

The first pass runs the model as it is, on held-out text. The second goes through the graph once more with calibration
text and the same held-out text: at each weight it sees what really reaches it (all before it are quantised already),
makes the quantised one, and goes on with that. Its logits on the held-out text are those of the quantised model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from .checkpoint import Checkpoint
from .node_major import Windows, run
from .quantise import Chosen, choose, quantised

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
