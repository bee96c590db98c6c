"""`--quant`: recipes, the graph with DequantizeLinear, the file, the accuracy gate, and what is refused."""

import json

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hand_made import DEMO
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.builder.calibrate import calibrate
from ingot.builder.calibration_text import Text
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.node_major import Windows, run
from ingot.builder.passes import optimise
from ingot.builder.quantise import choose, quantise
from ingot.calibration.accuracy import Accuracy, compare
from ingot.calibration.formats import round_to_nearest
from ingot.calibration.recipe import parse, recipes
from ingot.engines.errors import BuildError
from ingot.engines.manifest import Manifest
from ingot.engines.step import LOGITS
from ingot.engines.weights import load_graph, open_weights, random_weights, save_graph
from ingot.plugins.dtypes import to_torch
from ingot.plugins.interpreter import Program
from ingot.plugins.onnx_quantise import unpack_int4

DRAFT = DEMO / "pycoder-draft-2m"
GROUPS = "[{match: '*.self_attn.*', method: rtn, format: {dtype: int4, group: 32, symmetric: false}}, " \
         "{match: '*.mlp.*', method: gptq, format: {dtype: int4, group: 32}, act_order: true}]"  # fmt: skip


def recipe(rules, perplexity=10.0):
    return parse(f"{{perplexity: {perplexity}, rules: {rules}}}", "mine", "mine.yaml")


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open(str(DRAFT))


@pytest.fixture
def graph(checkpoint):
    """The engine's graph of the draft model in fp32, its weights lazy."""
    return optimise(export(checkpoint, torch.float32))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Some of this project's own text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    files = sorted((DEMO.parents[1] / "runtime").glob("*.py"))
    path.write_text("\n".join(file.read_text(encoding="utf-8") for file in files)[:24_000], encoding="utf-8")
    return path


def whole(model, windows):
    """Logits of a step by the program that engines run."""
    num, width = windows.tokens.shape
    pools = {v.name: torch.zeros(num, width, *(d for d in v.shape if isinstance(d, int)))
             for v in model.graph.inputs if "pages." in v.name}  # fmt: skip
    return Program(model, {})({**windows.inputs(), **pools})[LOGITS]


def windows(num, width, vocab=4096):
    return Windows(
        torch.randint(3, vocab, (num, width), generator=torch.Generator().manual_seed(num), dtype=torch.int32)
    )


# -- the graph ---------------------------------------------------------------------------------------------------------


def test_node_by_node_is_the_whole_program(graph):
    batches = [windows(3, 20), windows(1, 31)]
    for found, batch in zip(run(graph, batches), batches, strict=True):
        torch.testing.assert_close(found, whole(graph, batch))


@pytest.mark.parametrize("rules", [
    "[{match: '*', method: rtn, format: {dtype: int8}}]",
    "[{match: '*', method: rtn, format: {dtype: fp8_e4m3}}]",
    "[{match: '*', method: rtn, format: {dtype: fp8_e4m3, group: 128, rows: 128}}]",
    GROUPS,
])  # fmt: skip
def test_the_file_computes_what_was_measured(graph, checkpoint, source, rules, tmp_path):
    """The logits of the saved graph are those that the accuracy was measured with, for every format."""
    text = Text.read(source, checkpoint)
    batch = windows(2, 24)
    chosen = choose(graph, recipe(rules))
    scales, accuracy = calibrate(graph, recipe(rules), text)
    assert len(chosen) == len(accuracy.layers) == 4 * checkpoint.config.num_hidden_layers
    assert all(0 < layer.error < 0.5 for layer in accuracy.layers) and accuracy.num_tokens > 200
    numbers = {each.name: scales.weights.get(each.name) or round_to_nearest(each.weight(), each.format)
               for each in chosen}  # fmt: skip
    measured = list(run(graph, [batch], lambda name, x: (numbers[name].dequantise(), x) if name in numbers else None))
    quantise(graph, recipe(rules), scales)
    save_graph(graph, tmp_path)
    loaded = load_graph(tmp_path)
    torch.testing.assert_close(whole(loaded, batch), measured[0])
    weights = open_weights(tmp_path)
    assert not any(each.name in weights for each in chosen), "the original weights are not in the file"
    for each in chosen:
        stored, value = weights[f"{each.name}.quantised"], loaded.graph.initializers[f"{each.name}.quantised"]
        bits = 4 if each.format.dtype == "int4" else 8
        assert stored.nbytes == numbers[each.name].values.numel() * bits // 8
        assert torch.equal(to_torch(value.const_value).float(), numbers[each.name].values.float())
        assert (f"{each.name}.zero" in weights) != each.format.symmetric
    assert random_weights(loaded).keys() == weights.keys()


def test_int4_is_packed_as_onnx_does():
    numbers = np.random.default_rng(0).integers(-8, 8, (3, 10), dtype=np.int8)
    tensor = ir.Tensor(numbers.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    packed = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
    assert np.array_equal(unpack_int4(packed, (3, 10)).numpy(), numbers)


def test_a_weight_that_others_read_is_kept(graph):
    """The head of this model is its embedding."""
    names = [each.name for each in choose(graph, recipe("[{match: '*', method: rtn, format: {dtype: int8}}]"))]
    assert names and not any("embed" in name for name in names)


# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_accuracy_by_hand():
    """Two tokens of three: probabilities 3/4 and 1/4, then 1/2 and 1/2 where it was 3/4 and 1/4."""
    old = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]).log()
    new = torch.tensor([[0.75, 0.25], [0.6, 0.4], [0.9, 0.1]]).log()
    found = compare([old], [new], [torch.tensor([[1, 0, 1]])])
    assert found.num_tokens == 2 and found.top1 == 0.5
    assert found.perplexity_before == pytest.approx((0.75 * 0.75) ** -0.5)
    assert found.perplexity == pytest.approx((0.75 * 0.4) ** -0.5)
    kl = 0.25 * np.log(0.25 / 0.6) + 0.75 * np.log(0.75 / 0.4)
    assert found.kl == pytest.approx(kl / 2, rel=1e-5)


def test_better_recipes_are_better(graph, checkpoint, source):
    text = Text.read(source, checkpoint)
    found = {}
    for name, method, form in (("int8", "rtn", "int8"), ("rtn", "rtn", "int4, group: 64"),
                               ("gptq", "gptq", "int4, group: 64")):  # fmt: skip
        rules = recipe(f"[{{match: '*', method: {method}, format: {{dtype: {form}}}}}]")
        scales, found[name] = calibrate(graph, rules, text)
        assert bool(scales.weights) == (name == "gptq")
    assert found["int8"].kl < 0.1 * found["gptq"].kl < 0.09 * found["rtn"].kl
    assert found["int8"].top1 > found["gptq"].top1 > 0.5


# -- builds ------------------------------------------------------------------------------------------------------------


def build(tmp_path, source, **options):
    return build_engine(BuildConfig(str(DRAFT), str(tmp_path / "engine"), calibration_data=str(source), **options))


def test_a_quantised_engine_serves_and_says_what_it_is(tmp_path, source):
    jsonl = tmp_path / "text.jsonl"
    text = source.read_text(encoding="utf-8")
    jsonl.write_text("\n".join(json.dumps({"text": text[at : at + 4000]}) for at in range(0, len(text), 4000)))
    phases, done = [], []
    config = BuildConfig(str(DRAFT), str(tmp_path / "engine"), quant="w8a16", calibration_data=str(jsonl))
    build_engine(config, phases.append, lambda part, total: done.append(part / total))
    assert "calibrate and check w8a16" in phases and max(done) == 1
    manifest = Manifest.open(tmp_path / "engine")
    assert manifest.quantisation and manifest.quantisation["recipe"] == "w8a16"
    accuracy = Accuracy.of(manifest.quantisation["accuracy"])
    assert abs(accuracy.rise) < 0.005 and accuracy.top1 > 0.9 and not manifest.quantisation["accepted"]
    with LLM(tmp_path / "engine") as llm:
        (answer,) = llm.generate("import os\n", SamplingParams(max_tokens=8, temperature=0.0), progress=False)
    assert len(answer.outputs[0].token_ids) == 8


def test_the_gate_refuses_and_can_be_overruled(tmp_path, source):
    strict = tmp_path / "strict.yaml"
    strict.write_text("{perplexity: 0.001, rules: [{match: '*.mlp.*', method: rtn, format: {dtype: int4}}]}")
    with pytest.raises(BuildError, match=r"(?s)strict lets perplexity rise by at most 0.1%, but perplexity .*KL .*mlp"):
        build(tmp_path, source, quant=str(strict))
    assert not (tmp_path / "engine").exists()
    build(tmp_path, source, quant=str(strict), accept_accuracy=True)
    assert Manifest.open(tmp_path / "engine").quantisation["accepted"] is True


def test_options_that_make_no_sense(tmp_path, source):
    for options, words in (
        (dict(quant="w8a16", calibration_data=""), "needs text.*--calibration-data"),
        (dict(), "--calibration-data is for quantised builds"),
        (dict(calibration_data="", calibration_tokens=64), "--calibration-tokens is for quantised builds"),
        (dict(calibration_data="", accept_accuracy=True), "--accept-accuracy is for quantised builds"),
        (dict(quant="w9"), "there is no recipe 'w9'.*int4-gptq, int4-rtn"),
    ):
        with pytest.raises(BuildError, match=words):
            build_engine(BuildConfig(str(DRAFT), str(tmp_path / "e"), **{"calibration_data": str(source), **options}))


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_the_recipes_of_ingot_can_be_read():
    known = recipes()
    assert {each.name for each in known} >= {"w8a16", "int4-rtn", "int4-gptq"}
    assert all(each.description and each.rules for each in known)


def test_the_first_rule_that_matches_decides():
    rules = recipe("[{match: '*.mlp.*', method: keep}, {match: '*', method: rtn, format: {dtype: int8}}]")
    assert rules.rule("a.mlp.weight").method == "keep" and rules.rule("a.attn.weight").method == "rtn"


@pytest.mark.parametrize("text, words", [
    ("rules: [", "is not YAML"),
    ("[1]", "expected the keys description, kv_cache, mixed, perplexity, rules"),
    ("{perplexity: 0.1, rules: []}", "expected a list of at least one"),
    ("{perplexity: -1, rules: [{match: '*', method: keep}]}", "perplexity -1"),
    ("{perplexity: yes, rules: [{match: '*', method: keep}]}", "perplexity True"),
    ("{perplexity: 0.1, rules: [{match: '*', method: awk}]}", "method 'awk'; expected one of keep, rtn, gptq, awq"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn}]}", "method rtn and the format None"),
    ("{perplexity: 0.1, rules: [{match: '*', method: keep, format: {dtype: int8}}]}", "`keep` has none"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int3}}]}", "int3"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {bits: 4}}]}", "unknown key 'bits'"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8}, act_order: true}]}", "only with gptq"),
    ("{perplexity: 0.1, rules: [{match: 3, method: keep}]}", "match 3; expected a glob"),
    ("{perplexity: .inf, rules: [{match: '*', method: keep}]}", "perplexity inf; expected how much"),
    (f"{{perplexity: 1{'0' * 400}, rules: [{{match: '*', method: keep}}]}}", "expected how much"),
    (f"perplexity: 1{'0' * 5000}", "is not YAML: Exceeds the limit"),
    ("perplexity: 2001-99-99", "is not YAML: month must be"),
    ("perplexity: !!timestamp abc", "is not YAML"),
    ("[" * 3000 + "]" * 3000, "nested too deeply"),
    ("{perplexity: 0.1, rules: [{match: '*', method: keep}], perplexity: 1}", "has the key 'perplexity' twice"),
    ("{perplexity: 0.1, rules: [{match: '*', match: 'a', method: keep}]}", "has the key 'match' twice"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8, group: 1.5}}]}", "its group must be a"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8, group: yes}}]}", "its group must be a"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8, rows: '1'}}]}", "its rows must be a"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8, rows: 4294967296}}]}", "its rows must"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8, symmetric: 'no'}}]}", "its `symmetric"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8}, observer: [a]}]}", r"\['a'\]; exp"),
    ("{perplexity: 0.1, rules: [{match: '*', method: rtn, format: {dtype: int8, group: -1}}]}",
     "^the format of rule 1 of bad.yaml is {'dtype': 'int8', 'group': -1}: its group must be a whole number"),
    *((text.format("0x" + "f" * 5000), "bad.yaml (has|holds|is) .*(thousands of digits|too long to show)") for text in (
        "perplexity: {}\nrules: [1]", "perplexity: 1\nrules: {}", "{}", "perplexity: 1\nrules: [{}]",
        "perplexity: 1\nrules: [{{match: {}}}]", "perplexity: 1\nrules: [{{match: a, method: {}}}]",
        "perplexity: 1\nrules: [{{match: a, method: rtn, format: {{dtype: int8, group: {}}}}}]",
        "perplexity: 1\nrules: [{{match: a, method: rtn, format: {{dtype: {}}}}}]",
        "perplexity: 1\nrules: [{{match: a, method: keep}}]\nmixed: {{budget: {}}}",
        "perplexity: 1\nkv_cache: {{dtype: [{}]}}",
    )),
])  # fmt: skip
def test_a_recipe_that_is_none(text, words):
    with pytest.raises(BuildError, match=words):
        parse(text, "bad", "bad.yaml")


def test_a_recipe_that_does_not_fit_the_model(graph, checkpoint, source):
    text = Text.read(source, checkpoint)
    for rules, words in (
        ("[{match: '*.experts.*', method: rtn, format: {dtype: int8}}]", r"'\*.experts.\*' .* decides about no weight"),
        ("[{match: '*', method: keep}]", "keeps every weight as it is"),
        (
            "[{match: '*', method: rtn, format: {dtype: int4, group: 100}}]",
            "'model.layers.0.* group size of 100 does not",
        ),
    ):
        with pytest.raises(BuildError, match=words):
            calibrate(graph, recipe(rules), text)
