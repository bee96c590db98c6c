"""Which weights are worth more bits: how much worse the model becomes by each of them alone, and what fits a budget.

The damage of a weight in a format is the mean KL divergence of the logits when it alone is rounded to nearest, on some
of the calibration text: the gate's own text stays unseen. All of them are measured in one walk: at the node of a weight
the batch forks, once for each format, and the forks go on beside it. That is one forward from its node on for each, so
where they would be too many (a model with hundreds of Linears), whole blocks fork, with all their weights rounded, and
the damage of a block is shared out by the squared errors of its weights' outputs. Damages of several weights are taken
to add up, as KL does to second order where errors are independent.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from ..calibration.accuracy import divergence
from ..calibration.formats import Format, round_to_nearest
from ..calibration.recipe import Recipe, Rule
from ..engines.errors import BuildError
from ..plugins.interpreter import Values
from .node_major import OnNode, Walk, Windows, linear_weights
from .passes.graph import size
from .quantise import choose

TOKENS, LEAST = 1024, 512  # that damages are measured on; with fewer, blocks fork
MOST = 1 << 31  # bytes that the forks may have alive
Damages = Mapping[tuple[str, Format], float]


def mix(
    model: ir.Model, recipe: Recipe, text: Sequence[Windows], on_node: OnNode = lambda *_: None, device: str = "cpu"
) -> dict[str, int]:
    """Name of each weight that is to have one of `recipe.mixed.instead`, and which.

    Raises BuildError: a budget below what the rules take already, or as `choose` does.
    """
    mixed = recipe.mixed
    assert mixed is not None
    chosen = [each for each in choose(model, recipe) if each.kind == "linear"]
    rules = {each.name: (each.rule, *mixed.instead) for each in chosen}
    shapes = {each.name: (size(each.value, 0), size(each.value, 1)) for each in chosen}
    formats = {name: dict.fromkeys(rule.format for rule in each if rule.format) for name, each in rules.items()}
    damages = measure(model, formats, text, on_node, device)
    options = {
        name: [(bits(shapes[name], rule), damages[name, rule.format] if rule.format else 0.0) for rule in each]
        for name, each in rules.items()
    }
    num = sum(rows * columns for rows, columns in shapes.values())
    least = sum(each[0][0] for each in options.values())
    if least > mixed.budget * num:
        raise BuildError(
            f"the recipe {recipe.name} has a budget of {mixed.budget:g} bits a weight, but its rules take "
            f"{least / num:.2f}; raise the budget, or give rules with fewer bits."
        )
    best = spend(options, mixed.budget * num)
    return {name: index - 1 for name, index in best.items() if index}


def bits(shape: tuple[int, int], rule: Rule) -> float:
    """Bits of a weight [N, K] with its scales and zero points; kept: 16 a number."""
    rows, columns = shape
    if rule.format is None:
        return 16.0 * rows * columns
    n, k = rule.format.scale_shape(rows, columns)
    scales = (rows if rule.format.rows != 1 else n) * k  # a graph repeats the scale of several rows
    width = 4 if rule.format.dtype == "int4" else 8
    return width * rows * columns + scales * (32 + (0 if rule.format.symmetric else width))


def spend(options: Mapping[str, Sequence[tuple[float, float]]], budget: float) -> dict[str, int]:
    """The option of each name, (size, damage), that greedy exchange ends with: as long as one fits, the exchange that
    takes most damage away for its size. Names begin with their first option."""
    best = dict.fromkeys(options, 0)
    left = budget - sum(each[0][0] for each in options.values())
    while True:
        gains = []
        for name, each in options.items():
            (now, damage) = each[best[name]]
            for index, (other, less) in enumerate(each):
                if other - now <= left and less < damage:
                    gains.append(((damage - less) / max(other - now, 1e-9), -index, name))
        if not gains:
            return best
        _, index, name = max(gains)
        left -= options[name][-index][0] - options[name][best[name]][0]
        best[name] = -index


@torch.inference_mode()
def measure(
    model: ir.Model,
    formats: Mapping[str, Collection[Format]],
    text: Sequence[Windows],
    on_node: OnNode = lambda done, total, name: None,
    device: str = "cpu",
    most: int = MOST,
) -> Damages:
    """The damage of each weight in each format, in nats a token. most: bytes that the forks may have alive."""
    walk = Walk(model, device)
    names = [node.name for node in walk.nodes if node.name in formats]
    widest = max(size(value, 0) for name, value in linear_weights(model).items() if name in formats)
    each = 4 * widest  # bytes of a token of a fork, about
    alone = sum(map(len, formats.values())) * each * LEAST <= most
    unit = {name: name if alone else _block(name) for name in names}
    num_forks = len({(unit[name], form) for name in names for form in formats[name]})
    windows = _some(text, min(TOKENS, most // (each * num_forks)))
    origin, forks = walk.begin(windows), dict[tuple[str, Format], Values]()
    errors: dict[tuple[str, Format], float] = {}

    def begin(i: int) -> list[Mapping[int, Tensor]]:
        """What each fork reads at a node; where a weight to be measured is there, new ones begin."""
        node, own = walk.nodes[i], walk.weights(i)
        on_node(i, len(walk.nodes), node.name)
        rounded: dict[tuple[str, Format], Mapping[int, Tensor]] = {}
        for form in formats.get(node.name, ()):
            weight, (x,) = own[node.weight], walk.reads(node.source, [origin])
            result = round_to_nearest(weight, form).dequantise(weight.dtype)
            errors[node.name, form] = float((x.float() @ (result - weight).float().T).square().sum())
            rounded[unit[node.name], form] = own | {node.weight: result}
            forks.setdefault((unit[node.name], form), origin)
        return [own, *(rounded.get(key, own) for key in forks)]

    for i in range(walk.head):
        first, *others = begin(i)
        for key, own in zip(forks, others, strict=True):
            forks[key] = walk.launch(i, forks[key], own)
        origin = walk.launch(i, origin, first)
    first, *others = begin(walk.head)
    before = walk.finish(origin, first)
    found = {key: divergence(before, walk.finish(forks[key], own)) for key, own in zip(forks, others, strict=True)}
    on_node(len(walk.nodes), len(walk.nodes), "")
    whole: dict[tuple[str, Format], float] = defaultdict(float)
    for (name, form), error in errors.items():
        whole[unit[name], form] += error
    return {
        (name, form): found[unit[name], form] * error / (whole[unit[name], form] or 1.0)
        for (name, form), error in errors.items()
    }


def _block(name: str) -> str:
    """`model.layers.3` of all weights of layer 3; a name without a number is a block of its own."""
    found = re.match(r"(.*?\b\d+)\b", name)
    return found[1] if found else name


def _some(text: Sequence[Windows], num_tokens: int) -> Windows:
    """Windows from all of the text, one at least."""
    every = torch.cat([windows.tokens for windows in text])
    num = min(max(num_tokens // every.shape[1], 1), len(every))
    return Windows(every[torch.linspace(0, len(every) - 1, num).long()])
