"""A KV cache in 8 bits: scales from what attention writes, the graph with them, and what is refused."""

from functools import cache

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES, VOCAB
from hand_made import DEMO
from ingot.builder import BuildConfig, build_engine, gate
from ingot.builder.calibrate import Text, calibrate
from ingot.builder.export import export
from ingot.builder.journal import Journal
from ingot.builder.kv_cache import PoolScales, _centre, quantise_pools
from ingot.builder.node_major import Windows, run
from ingot.builder.passes import optimise
from ingot.builder.passes.verify import verify
from ingot.builder.quantise import choose
from ingot.builder.record import kv_layers
from ingot.builder.weights import attach
from ingot.calibration.recipe import KVCache, Recipe, kv_recipes, parse
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError, EngineError
from ingot.engines.step import LOGITS, STEP_INPUTS
from ingot.plugins.dtypes import TORCH_DTYPES
from ingot.plugins.interpreter import Program

KINDS = [KVCache("fp8_e4m3"), KVCache("int8", "head", "mse"), KVCache("fp8_e4m3", centred=True)]
REACH = {"fp8_e4m3": 448, "int8": 127.5}
TYPES = {"fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}


@cache
def exported(family):
    """A small random model's graph in fp32."""
    config = FAMILIES[family]()
    graph = export(config, torch.float32)
    attach(graph, gate._random_model(config).state_dict())
    return optimise(graph)


def model_of(family):
    """A copy that may be changed."""
    return ir.Model(exported(family).graph.clone(), ir_version=10)


@pytest.fixture
def graph():
    return model_of("llama")


def windows(num, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(3, VOCAB, (num, width), generator=generator, dtype=torch.int32))


def whole(model, batch):
    """Logits and pools of a step by the program that engines run."""
    pools = {
        value.name: torch.zeros(*batch.tokens.shape, *gate._numbers(value), dtype=TORCH_DTYPES[int(value.dtype)])
        for value in model.graph.inputs
        if value.name not in STEP_INPUTS
    }
    return Program(model, {})({**batch.inputs(), **pools})[LOGITS], pools


TEXT = Text((windows(3, 24, 1), windows(2, 24, 2)), (windows(3, 24, 3),))


# -- the graph ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])  # packed q|k|v and sinks
@pytest.mark.parametrize("kv", KINDS, ids=KVCache.spelt)
def test_what_is_measured_is_what_the_graph_computes(family, kv):
    model = model_of(family)
    before = whole(model, TEXT.held_out[0])[0]
    journal = Journal.none()
    pools = PoolScales(kv, len(TEXT.calibration), journal.scales, journal)
    (*_, measured) = run(pools.graph(model), TEXT.calibration + TEXT.held_out, give=pools)
    scales, layers = journal.scales.kv, journal.layers.values()
    assert torch.equal(whole(model, TEXT.held_out[0])[0], before), "the search leaves the graph as it was"
    quantise_pools(model, kv.dtype, scales)
    verify(model, "quantise_pools")
    found, pools = whole(model, TEXT.held_out[0])
    torch.testing.assert_close(found, measured)
    assert 0 < (found - before).abs().mean() < 0.2 * before.abs().mean()
    assert {pool.dtype for pool in pools.values()} == {TYPES[kv.dtype]}
    assert len(layers) == len(pools) and all(0 < layer.error < 0.06 for layer in layers)
    heads = {value.name: gate._numbers(value)[0] if kv.per == "head" else 1 for value in model.graph.inputs[7:]}
    assert {name: len(scale) for name, scale in scales.items() if "offset" not in name} == heads
    centred = kv.centred and family == "llama"  # sinks are a score that would not change with the others
    assert {name for name in scales if "offset" in name} == ({"k_offset.0", "k_offset.1"} if centred else set())
    assert sum(node.op_type == "Sub" for node in model.graph) == 2 * centred
    assert {layer.dtype for layer in kv_layers(model)} == {str(TYPES[kv.dtype]).removeprefix("torch.")}


@pytest.mark.parametrize("per", ["layer", "head"])
def test_scales_cover_what_the_first_pool_gets(graph, per):
    """Keys after the rotation, of all calibration batches: what a plain engine has in its pool of layer 0."""
    journal = Journal.none()
    pools = PoolScales(KVCache("fp8_e4m3", per), 2, journal.scales, journal)
    list(run(pools.graph(graph), TEXT.calibration + TEXT.held_out, give=pools))
    for name in ("k_pages.0", "v_pages.0"):
        written = torch.cat([whole(graph, batch)[1][name].flatten(0, 1) for batch in TEXT.calibration])  # [T, H, D]
        most = written.abs().amax((0, 2) if per == "head" else (0, 1, 2)).reshape(-1)
        torch.testing.assert_close(journal.scales.kv[name], most / 448)


def test_no_scale_no_pool(graph):
    scales = {value.name: torch.ones(1) for value in graph.graph.inputs[7:]}
    for bad, words in (
        ({}, "v_pages.1 has no calibrated scale"),
        ({"v_pages.1": torch.ones(3)}, r"is \[1.0, 1.0, 1.0\]; expected 1 or 2 numbers above 0"),
        ({"v_pages.1": torch.tensor([0.0])}, r"is \[0.0\]; expected"),
        ({"v_pages.1": torch.tensor([float("nan")])}, "expected 1 or 2 numbers above 0"),
    ):
        with pytest.raises(BuildError, match=words):
            quantise_pools(graph, "fp8_e4m3", {n: s for n, s in scales.items() if n != "v_pages.1"} | bad)


def test_a_graph_without_scales_is_refused_by_its_node(graph):
    for value in graph.graph.inputs[7:]:
        value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    with pytest.raises(EngineError, match=r"node '.*PagedAttention.* has k_pages of FLOAT8E4M3FN without a k_scale"):
        Program(graph, {})
    quantise_pools(graph, "int8", {value.name: torch.ones(1) for value in graph.graph.inputs[7:]})
    for value in graph.graph.inputs[7:]:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    with pytest.raises(EngineError, match="has a k_scale, but its k_pages are FLOAT"):
        Program(graph, {})


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_finds_scales_with_weights_or_alone(graph):
    alone = kv_recipes()["int8-head"]
    scales, accuracy = calibrate(graph, alone, TEXT)
    assert not choose(graph, alone) and scales.kv.keys() == {value.name for value in graph.graph.inputs[7:]}
    assert [layer.name for layer in accuracy.layers] == list(scales.kv) and accuracy.kl > 0
    rules = "[{match: '*.mlp.*', method: rtn, format: {dtype: int8}}]"
    both = parse(f"{{perplexity: 1, rules: {rules}, kv_cache: {{dtype: int8, per: head}}}}", "both", "both.yaml")
    assert both.kv_cache == KVCache("int8", "head")
    scales, accuracy = calibrate(graph, both, TEXT)
    chosen = choose(graph, both)
    assert chosen and len(accuracy.layers) == len(chosen) + len(scales.kv)


def test_keys_that_are_not_finite(graph):
    def poisoned(name, inputs):
        hurt = "layers.1" in name and inputs[0].shape[1] == 64
        return (torch.full((128, 64), torch.nan), inputs) if hurt else None

    pools = PoolScales(KINDS[0], 1, Scales(), Journal.none())
    with pytest.raises(BuildError, match="the KV pool k_pages.1 cannot be quantised: an activation has .* NaN"):
        list(run(pools.graph(graph), [windows(1, 8)], poisoned, give=pools))


def test_an_offset_of_all_keys_changes_no_logit(graph):
    before = whole(graph, TEXT.held_out[0])[0]
    for node in [node for node in graph.graph if node.op_type == "PagedAttention"]:
        _centre(graph, node, f"offset of {node.name}", torch.randn(32))
    verify(graph, "_centre")
    torch.testing.assert_close(whole(graph, TEXT.held_out[0])[0], before, rtol=1e-4, atol=1e-4 * float(before.max()))


def test_keys_with_a_mean_lose_less_when_they_are_centred():
    """As those of trained models; here it is their bias that gives them one."""
    model = model_of("qwen2")
    for name, value in model.graph.initializers.items():
        if name.endswith("bias"):
            value.const_value = ir.tensor(40 * value.const_value.numpy(), name=name)
    error = {}
    for centred in (False, True):
        journal = Journal.none()
        pools = PoolScales(KVCache("fp8_e4m3", centred=centred), 2, journal.scales, journal)
        list(run(pools.graph(model), TEXT.calibration + TEXT.held_out, give=pools))
        error[centred] = journal.layers["k_pages.0"].error
    assert error[True] < 0.7 * error[False]


# -- recipes and options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv, words", [
    ("fp8", "holds 'fp8'; expected the keys centred, dtype, observer, per"),
    ("{per: layer}", "the dtype None; expected one of fp8_e4m3, int8"),
    ("{dtype: int4}", "the dtype 'int4'"),
    ("{dtype: int8, per: token}", "the per 'token'; expected one of layer, head"),
    ("{dtype: int8, observer: mean}", "the observer 'mean'; expected one of absmax, percentile, mse, entropy"),
    ("{dtype: int8, scale: 1}", "unknown key 'scale'"),
    ("{dtype: int8, centred: 1}", "the centred 1; expected true or false"),
])  # fmt: skip
def test_a_kv_cache_that_is_none(kv, words):
    with pytest.raises(BuildError, match=f"the kv_cache of bad.yaml .*{words}"):
        parse(f"{{perplexity: 0.1, kv_cache: {kv}}}", "bad", "bad.yaml")


def test_a_recipe_of_a_kv_cache_alone():
    recipe = parse("{perplexity: 0.1, kv_cache: {dtype: fp8_e4m3, observer: mse}}", "mine", "mine.yaml")
    assert recipe == Recipe("mine", "", 0.1, (), kv_cache=KVCache("fp8_e4m3", "layer", "mse")) and recipe.needs_text


def test_options_that_make_no_sense(tmp_path):
    for options, words in (
        (dict(kv_cache="fp8"), "--kv-cache fp8 needs text: its scales .* have no default; pass --calibration-data"),
        (
            dict(kv_cache="fp4", calibration_data="x"),
            "'fp4'; pass --kv-cache one of fp8, int8, fp8-head, int8-head, fp8-centred",
        ),
    ):
        with pytest.raises(BuildError, match=words):
            build_engine(BuildConfig(str(DEMO / "pycoder-draft-2m"), str(tmp_path / "e"), **options))
