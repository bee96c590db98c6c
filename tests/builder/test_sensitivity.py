"""The search of a mixed recipe: damages against a straightforward computation, the budget, and who gets the bits."""

import pytest
import torch
from ingot.builder import sensitivity
from ingot.builder.node_major import run
from ingot.builder.sensitivity import bits, measure, mix, spend
from ingot.calibration.accuracy import divergence
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.recipe import parse
from ingot.engines.errors import BuildError
from ingot.plugins.dtypes import to_torch
from tiny_llama import text, tiny

INT4, INT8 = Format("int4", 32), Format("int8")


@pytest.fixture(scope="module")
def graph():
    return tiny()


def recipe(budget, instead="{method: rtn, format: {dtype: int8}}, {method: keep}", rules=""):
    return parse(
        f"{{perplexity: 1, rules: [{rules}{{match: '*', method: rtn, format: {{dtype: int4, group: 32}}}}], "
        f"mixed: {{budget: {budget}, instead: [{instead}]}}}}", "mixed", "mixed.yaml",
    )  # fmt: skip


def alone(graph, names, form, windows):
    """KL of the logits with these weights rounded, from those without, by two whole walks."""

    def replace(name, inputs):
        if name not in names:
            return None
        weight = to_torch(graph.graph.initializers[name].const_value)
        return round_to_nearest(weight, form).dequantise(weight.dtype), inputs

    (before,), (after,) = run(graph, [windows]), run(graph, [windows], replace)
    return divergence(before, after)


@pytest.fixture(scope="module")
def windows():
    return sensitivity._some(text().calibration, sensitivity.TOKENS)


def test_each_weight_alone(graph, windows):
    names = ["0.qkv", "1.down", "3.gate_up"]
    nodes = []
    found = measure(graph, {name: [INT4, INT8] for name in names}, text().calibration, lambda *n: nodes.append(n))
    assert found.keys() == {(name, form) for name in names for form in (INT4, INT8)}
    for (name, form), damage in found.items():
        assert damage == pytest.approx(alone(graph, {name}, form, windows), rel=1e-4), name
    assert all(found[name, INT4] > 10 * found[name, INT8] > 0 for name in names)
    assert nodes[-1][0] == nodes[-1][1] and {name for *_, name in nodes} > set(names)


def test_by_blocks_where_there_are_many(graph, windows):
    """A block's weights share out the damage of all of them together, by the errors they make."""
    names = ["0.qkv", "0.down", "2.o", "2.gate_up"]
    found = measure(graph, {name: [INT4] for name in names}, text().calibration, most=1)
    few = sensitivity._some(text().calibration, 0)
    assert few.tokens.shape[0] == 1, "one window at least"
    for block in "02":
        members = [name for name in names if name.startswith(block)]
        together = sum(found[name, INT4] for name in members)
        assert together == pytest.approx(alone(graph, set(members), INT4, few), rel=1e-4)
        assert all(found[name, INT4] > 0 for name in members)


def test_the_budget_is_kept_and_spent_where_it_helps(graph):
    options = {"a": [(4, 1.0), (8, 0.1), (16, 0.0)], "b": [(4, 5.0), (8, 0.5), (16, 0.0)], "c": [(4, 0.2), (8, 0.02)]}
    assert spend(options, 12) == {"a": 0, "b": 0, "c": 0}
    assert spend(options, 16) == {"a": 0, "b": 1, "c": 0}
    assert spend(options, 23) == {"a": 1, "b": 1, "c": 0}
    assert spend(options, 100) == {"a": 2, "b": 2, "c": 1}
    worse = {"a": [(4, 1.0), (8, 2.0), (16, 0.5)]}
    assert spend(worse, 8) == {"a": 0} and spend(worse, 16) == {"a": 2}


def test_sizes():
    assert bits((6, 64), parse("{perplexity: 1, rules: [{match: '*', method: keep}]}", "", "").rules[0]) == 16 * 6 * 64
    for form, expected in (
        ("int4, group: 32", 4 * 384 + 12 * 32), ("int4, group: 32, symmetric: false", 4 * 384 + 12 * 36),
        ("int8", 8 * 384 + 6 * 32), ("fp8_e4m3, group: 32, rows: 3", 8 * 384 + 12 * 32),
    ):  # fmt: skip
        rule = parse(f"{{perplexity: 1, rules: [{{match: '*', method: rtn, format: {{dtype: {form}}}}}]}}", "", "")
        assert bits((6, 64), rule.rules[0]) == expected


def test_a_mixed_recipe_becomes_rules(graph):
    own = recipe(7.0, rules="{match: '0.*', method: keep}, ")
    found = mix(graph, own, text().calibration)
    names = [f"{i}.{part}" for i in range(4) for part in ("qkv", "o", "gate_up", "down")]
    assert found and found.keys() < set(names[4:]), "some, and none that is kept"
    rules = own.mixing(found, names)
    assert rules.mixed is None
    for name in names:
        expected = own.mixed.instead[found[name]].format if name in found else own.rule(name).format
        assert rules.rule(name).format == expected
    shapes = {name: tuple(graph.graph.initializers[name].shape.numpy()) for name in names[4:]}
    spent = sum(bits(shape, rules.rule(name)) for name, shape in shapes.items())
    num = sum(rows * columns for rows, columns in shapes.values())
    assert 6.0 * num < spent <= 7.0 * num
    every = own.mixing(dict.fromkeys(names[4:], 1), names)
    assert [rule.method for rule in every.rules] == ["keep"] * 13, "a rule that nothing is left for is gone"
    odd = own.mixing({"layers.[0].down": 0}, ["layers.[0].down"])
    assert odd.rule("layers.[0].down").format == INT8 and odd.rule("layers.0.down") is None


@pytest.mark.parametrize("change, words", [
    ("{budget: 4.5, instead: [{method: keep}]}", "budget of 4.5 bits a weight, but its rules take 5.00"),
    ("{budget: many, instead: [{method: keep}]}", "budget 'many'; expected bits"),
    ("{budget: 5}", "None instead of its rules"),
    ("{budget: 5, instead: [{match: '*', method: keep}]}", "rules without a match"),
    ("{budget: 5, instead: [{method: awq, format: {dtype: int4}}]}", "smooths"),
    ("{budget: 5, instead: [keep]}", "rule 1 of `mixed` of mine"),
    ("{bits: 5, instead: [{method: keep}]}", "unknown key 'bits'"),
])  # fmt: skip
def test_a_mixed_recipe_that_is_none(graph, change, words):
    rules = "[{match: '*', method: rtn, format: {dtype: int4, group: 32}}]"
    with pytest.raises(BuildError, match=words):
        mix(graph, parse(f"{{perplexity: 1, rules: {rules}, mixed: {change}}}", "mine", "mine"), text().calibration)


def test_the_searched_choice_is_better_than_another_of_its_size(graph):
    own = recipe(6.0, instead="{method: rtn, format: {dtype: int8}}")
    names = [f"{i}.{part}" for i in range(4) for part in ("qkv", "o", "gate_up", "down")]
    found = mix(graph, own, text().calibration)
    held = text().held_out[0]

    def kl(chosen):
        rules = own.mixing(chosen, names)

        def replace(name, inputs):
            weight = to_torch(graph.graph.initializers[name].const_value)
            return round_to_nearest(weight, rules.rule(name).format).dequantise(weight.dtype), inputs

        (before,), (after,) = run(graph, [held]), run(graph, [held], replace)
        return divergence(before, after)

    shapes = {name: graph.graph.initializers[name].shape.numpy() for name in names}
    spent = sum(shapes[name][0] * shapes[name][1] for name in found)
    others = []
    for seed in range(6):
        left, other = spent, {}
        for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist():
            if shapes[names[i]][0] * shapes[names[i]][1] <= left:
                other[names[i]] = 0
                left -= shapes[names[i]][0] * shapes[names[i]][1]
        others.append(kl(other))
    assert kl(found) < 0.9 * sum(others) / len(others)
