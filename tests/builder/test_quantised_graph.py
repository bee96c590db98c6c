"""A recipe's graph computes what its calibration measured, and can be made again from the file; what is refused."""

import pytest
import torch
from ingot.builder.calibrate import calibrate
from ingot.builder.calibration_text import Text
from ingot.builder.gate import packed
from ingot.builder.node_major import run
from ingot.builder.passes import drop_dead
from ingot.builder.passes.graph import nodes, operand
from ingot.builder.passes.lowering import lower_quantised
from ingot.builder.passes.verify import verify
from ingot.builder.quantise import choose, quantise
from ingot.calibration.accuracy import compare
from ingot.calibration.formats import Format, round_to_nearest
from ingot.calibration.recipe import Recipe, parse, recipes
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from ingot.engines.step import LOGITS
from ingot.engines.weights import random_weights
from ingot.plugins.dtypes import to_torch
from random_graph import random_graph, random_windows

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
VOCAB = 304
TEXT = Text(tuple(random_windows(2, 48, VOCAB, seed) for seed in range(2)), (random_windows(3, 40, VOCAB, 9),))
PROMPTS = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (19, 34, 1, 27)]
EMBEDDING = "{match: '*embed_tokens.weight', method: rtn, format: {dtype: int8}}"
OTHERS = {
    "w4a8": "{match: '*mlp*', method: awq, format: {dtype: int4, group: 32}, activation: {dtype: int8}}",
    "observed": "{match: '*', method: gptq, format: {dtype: int8}, activation: {dtype: int8, rows: 0}, observer: mse}",
    "tensor": "{match: '*', method: smoothquant, format: {dtype: fp8_e4m3, rows: 0}, "
              "activation: {dtype: fp8_e4m3, rows: 0}, observer: percentile}",
    "embedding": EMBEDDING + ", {match: '*', method: rtn, format: {dtype: int8}}",
}  # fmt: skip


def mine(rules):
    return parse(f"{{perplexity: 10, rules: [{rules}]}}", "mine", "mine.yaml")


def recipe_of(name):
    return mine(OTHERS[name]) if name in OTHERS else Recipe.open(name)


@pytest.mark.parametrize("name", [*(recipe.name for recipe in recipes()), *OTHERS])
def test_the_graph_computes_what_was_measured(name, tmp_path):
    """bf16, where a fold that rounds, or another order of rounding, would show; and the file makes the same graph."""
    recipe, graph = recipe_of(name), random_graph("llama", torch.bfloat16, **SIZES)
    before = {name: value.const_value for name, value in graph.graph.initializers.items()}
    scales, accuracy = calibrate(graph, recipe, TEXT)
    assert {name: value.const_value for name, value in graph.graph.initializers.items()} == before
    assert 0 < accuracy.kl < 0.5 and all(0 < layer.error < 0.5 for layer in accuracy.layers)
    scales.save(tmp_path / "scales.safetensors")
    graphs = []
    for found in (scales, Scales.open(tmp_path / "scales.safetensors")):
        graphs.append(graph.clone())
        quantise(graphs[-1], recipe, found)
        verify(graphs[-1], name)
    tokens = [windows.tokens for windows in TEXT.held_out]
    logits = [list(run(model, TEXT.held_out)) for model in (graph, *graphs)]
    found = compare(logits[0], logits[1], tokens)
    assert (found.kl, found.perplexity, found.top1) == (accuracy.kl, accuracy.perplexity, accuracy.top1)
    assert torch.equal(logits[1][0], logits[2][0])
    first, second = (model.graph.initializers for model in graphs)
    assert first.keys() == second.keys() == random_weights(graphs[0]).keys()
    assert all(torch.equal(*(to_torch(g[name].const_value).float() for g in (first, second))) for name in first)


@pytest.mark.parametrize("name", ["fp8", "fp8-static", "fp8-block", "int8-sq", "int4-awq"])
def test_what_targets_run_is_the_same(name):
    recipe, graph = Recipe.open(name), random_graph("llama", **SIZES)
    scales, _ = calibrate(graph, recipe, TEXT)
    quantise(graph, recipe, scales)
    lowered = graph.clone()
    lower_quantised(lowered)
    drop_dead(lowered)
    assert len(nodes(lowered, "QuantisedLinear")) == 8 and not nodes(lowered, "DequantizeLinear")
    for expected, found in zip(packed(graph, PROMPTS)[LOGITS], packed(lowered, PROMPTS)[LOGITS], strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.02  # a number that rounds the other way


def test_quantised_activations_are_shared():
    """Cohere's attention and MLP read the same norm."""
    graph = random_graph("cohere2", num_hidden_layers=2)
    quantise(graph, Recipe.open("fp8"), Scales())
    assert len(nodes(graph, "Linear")) == 9 and len(nodes(graph, "QuantiseTokens")) == 7


# -- embeddings and experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the head of qwen2 is its embedding
def test_an_embedding_is_gathered_before_it_is_taken_back(family):
    graph, recipe = random_graph(family, num_hidden_layers=2), mine(EMBEDDING)
    expected = graph.clone()
    (table,) = (each.value for each in choose(expected, recipe))
    rounded = round_to_nearest(to_torch(table.const_value), Format("int8")).dequantise()
    table.const_value = type(table.const_value)(rounded, name=table.name)
    quantise(graph, recipe, Scales())
    verify(graph, "quantise")
    names = set(graph.graph.initializers)
    assert table.name not in names and {f"{table.name}.quantised", f"{table.name}.scale"} <= names
    gathered = [node for node in nodes(graph, "Gather") if (operand(node).name or "").startswith(table.name)]
    assert len(gathered) == 2
    assert len(nodes(graph, "DequantizeLinear")) == (2 if family == "qwen2" else 1)
    for a, b in zip(packed(expected, PROMPTS)[LOGITS], packed(graph, PROMPTS)[LOGITS], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # gpt_oss has them transposed
@pytest.mark.parametrize("form", ["int8", "int4, group: 16, symmetric: false", "fp8_e4m3, group: 24, rows: 24"])
def test_experts_in_few_bits(family, form):
    graph = random_graph(family)
    recipe = mine(f"{{match: '*experts*proj', method: rtn, format: {{dtype: {form}}}}}")
    expected = graph.clone()
    chosen = choose(expected, recipe)
    assert len(chosen) == 4 and all(each.kind == "experts" for each in chosen)
    for each in chosen:

        def turned(x):
            return x.T if family == "gpt_oss" else x  # noqa: B023

        rounded = [turned(round_to_nearest(turned(w), each.format).dequantise()) for w in each.weight()]
        each.value.const_value = type(next(iter(graph.graph.initializers.values())).const_value)(
            torch.stack(rounded).contiguous(), name=each.name
        )
    quantise(graph, recipe, Scales())
    verify(graph, "quantise")
    for a, b in zip(packed(expected, PROMPTS)[LOGITS], packed(graph, PROMPTS)[LOGITS], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, rules, words", [
    ("mixtral", "{match: '*', method: gptq, format: {dtype: int8}}", "experts' weight '.*' by gptq, which needs what"),
    ("llama", "{match: '*embed_tokens.weight', method: rtn, format: {dtype: int4}}", "embedding can be stored by rtn"),
    ("llama", EMBEDDING[:-1] + ", activation: {dtype: int8}}", "embedding can be stored by rtn in int8"),
    ("llama", "{match: '*', method: rtn, format: {dtype: int8}, activation: {dtype: int8, group: 48}}",
     "weight 'model.layers.0.self_attn.* group size of 48 does not divide"),
])  # fmt: skip
def test_what_cannot_be_stored(family, rules, words):
    with pytest.raises(BuildError, match=words):
        choose(random_graph(family), mine(rules))


@pytest.mark.parametrize("name, words", [
    ("../recipes/fp8", "^there is no recipe"),
    ("none.yaml", r"^the recipe 'none.yaml' cannot be read \(No such file or directory\); pass one of fp8, "),
])  # fmt: skip
def test_a_recipe_that_is_not_there(name, words):
    with pytest.raises(BuildError, match=words):
        Recipe.open(name)


def test_scales_of_another_recipe():
    graph = random_graph("llama", **SIZES)
    for name in ("int4-gptq", "int4-awq", "fp8-static"):
        with pytest.raises(BuildError, match="the scales have no .* for 'model.layers.0.self_attn.*: calibrate anew"):
            quantise(graph.clone(), Recipe.open(name), Scales())


def test_activations_that_are_not_finite_are_named():
    graph = random_graph("llama", **SIZES)
    norm = graph.graph.initializers["model.layers.1.post_attention_layernorm.weight"]
    broken = to_torch(norm.const_value)
    broken[3] = torch.inf
    norm.const_value = type(norm.const_value)(broken, name=norm.name)
    with pytest.raises(BuildError, match="what the weight 'model.layers.1.mlp.gate_proj.*' reads has .* infinite"):
        calibrate(graph, Recipe.open("fp8"), TEXT)


@pytest.mark.parametrize("rule, words", [
    ("method: rtn, format: {dtype: int8}, activation: {dtype: int4}", "expected int8 or fp8_e4m3 without zero points"),
    ("method: rtn, format: {dtype: int8}, activation: {dtype: int8, rows: 0, group: 8}", "for all .rows: 0"),
    ("method: rtn, format: {dtype: int8}, observer: mse", "the observer 'mse'.* only with static activations"),
    ("method: rtn, format: {dtype: int8}, activation: {dtype: int8, rows: 0}, observer: best", "the observer 'best'"),
    ("method: smoothquant, format: {dtype: int8}", "smooths activations that it does not quantise"),
])  # fmt: skip
def test_rules_that_contradict_themselves(rule, words):
    with pytest.raises(BuildError, match=words):
        mine(f"{{match: '*', {rule}}}")
