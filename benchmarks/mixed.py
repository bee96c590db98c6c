"""What a mixed recipe gains: the search's choice of weights against others of the same size, on text of one's own.

    python benchmarks/mixed.py MODEL TEXT [--recipe mixed] [--random 4] [--tokens 16384]

Each row is calibrated as usual and measured on held-out text. At the size of the search's choice: uniform INT4 in
groups as small as that size allows; the same search with damages shuffled among the weights, which spends the same bits
on weights taken at random; and the first weights of the model upgraded in order until the budget is spent.
"""

import argparse
import random
from dataclasses import replace

import torch
from ingot.builder import sensitivity
from ingot.builder.calibrate import calibrate
from ingot.builder.calibration_text import Text
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.passes import optimise
from ingot.builder.passes.graph import size
from ingot.builder.quantise import choose
from ingot.calibration.formats import Format
from ingot.calibration.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--recipe", default="mixed")
    parser.add_argument("--random", type=int, default=4, help="choices at random")
    parser.add_argument("--tokens", type=int, default=16384)
    args = parser.parse_args()
    checkpoint = Checkpoint.open(args.model)
    graph = optimise(export(checkpoint, torch.float32))
    text = Text.read(args.text, checkpoint, args.tokens)
    recipe = Recipe.open(args.recipe)
    assert recipe.mixed
    chosen = {each.name: each for each in choose(graph, recipe) if each.kind == "linear"}
    shapes = {name: (size(each.value, 0), size(each.value, 1)) for name, each in chosen.items()}
    rules = {name: (each.rule, *recipe.mixed.instead) for name, each in chosen.items()}
    num = sum(rows * columns for rows, columns in shapes.values())
    formats = {name: [rule.format for rule in each if rule.format] for name, each in rules.items()}
    damages = sensitivity.measure(graph, formats, text.calibration)

    def choice(damage) -> dict[str, int]:
        options = {
            name: [(sensitivity.bits(shapes[name], rule), damage(name, rule)) for rule in each]
            for name, each in rules.items()
        }
        best = sensitivity.spend(options, recipe.mixed.budget * num)
        return {name: index - 1 for name, index in best.items() if index}

    def measured(title: str, own: Recipe, better: dict[str, int]) -> float:
        _, accuracy = calibrate(graph, own, text)
        spent = sum(sensitivity.bits(shapes[name], own.rule(name)) for name in chosen) / num
        figures = f"perplexity {100 * accuracy.rise:+6.2f}%  KL {accuracy.kl:.5f}  top-1 {100 * accuracy.top1:.2f}%"
        print(f"{title:24} {spent:6.3f} bits  {figures}  {len(better)} of {len(chosen)} weights better", flush=True)
        return accuracy.kl

    def mixed(title: str, better: dict[str, int]) -> float:
        return measured(title, recipe.mixing(better, list(chosen)), better)

    base = replace(recipe, mixed=None)
    measured("as the rules say", base, {})
    found = mixed("the search", choice(lambda name, rule: damages[name, rule.format] if rule.format else 0.0))
    for group in (64, 32, 16):
        rule = replace(recipe.rules[-1], format=Format("int4", group))
        if sum(sensitivity.bits(shape, rule) for shape in shapes.values()) <= recipe.mixed.budget * num:
            best = rule
    measured(f"int4, groups of {best.format.group}", replace(base, rules=(*recipe.rules[:-1], best)), {})
    others = []
    for seed in range(args.random):
        names = list(chosen)
        other = dict(zip(names, random.Random(seed).sample(names, len(names)), strict=True))
        others.append(mixed(f"at random {seed}", choice(
            lambda name, rule, other=other: damages[other[name], rule.format] if rule.format else 0.0)))  # fmt: skip
    order = {name: len(chosen) - i for i, name in enumerate(chosen)}
    first = mixed("the first ones in int8", choice(
        lambda name, rule: order[name] * (rule.format.dtype == "int4" and 1e6) if rule.format else 1.0))  # fmt: skip
    mean = sum(others) / max(len(others), 1)
    print(f"KL of the search over that at random, mean: {found / mean:.3f}; over the first ones: {found / first:.3f}")


if __name__ == "__main__":
    main()
