"""Quantised graphs on the cuda target: what is fused, and that a plan computes what the graph in Q/DQ form does."""

import math

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES

pytest.importorskip("triton")

from ingot import BuildConfig
from ingot.builder import gate
from ingot.builder.export import export
from ingot.builder.passes import optimise
from ingot.builder.quantise import quantise
from ingot.builder.targets.buckets import Sizes
from ingot.builder.targets.cuda import begin, make_plan
from ingot.builder.targets.fusion import fuse
from ingot.builder.targets.planner import Planner
from ingot.builder.weights import attach
from ingot.calibration.recipe import parse
from ingot.calibration.scales import Scales
from ingot.engines import step
from ingot.engines.errors import BuildError
from ingot.engines.plan import Plan
from ingot.engines.weights import load_graph, open_weights, save_graph
from ingot.plugins import tactics_of
from ingot.plugins.interpreter import Program
from ingot.plugins.tactic import Device
from plan_run import PlanRun, padded, step_inputs

PAGE_SIZE, WIDTH = 4, 16
PROMPTS, LAYERS = (5, 9), 2
SIZES = [Sizes(32, 4, 4, 0), Sizes(4, 4, 4, 1)]
ALL = "{perplexity: 1, rules: [{match: '*', method: rtn, format: %s}]}"
INT4 = "{dtype: int4, group: 16, symmetric: false}"
FEW_BITS = {"int4": (INT4, ""), "fp8": ("{dtype: fp8_e4m3}",) * 2, "int8": ("{dtype: int8}",) * 2,
            "fp8-block": ("{dtype: fp8_e4m3, group: 32, rows: 32}", "{dtype: fp8_e4m3, group: 32}")}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A small Llama in fp32."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = LAYERS
    graph = export(config, torch.float32)
    attach(graph, gate._random_model(config).state_dict())
    return optimise(graph)


def quantised(model, name):
    """A copy of the model in Q/DQ form."""
    form, activation = FEW_BITS[name]
    graph = ir.Model(model.graph.clone(), ir_version=10)
    rule = f"{form}, activation: {activation}" if activation else form
    quantise(graph, parse(ALL % rule, "mine", "mine.yaml"), Scales())
    return graph


def quickest(site):
    """The tactic of the fewest programs, which are what takes time in the interpreter."""
    return min(tactics_of(site.op)(site), key=lambda tactic: sum(math.prod(each.grid) for each in tactic.launches))


EXPECTED = {
    "int4": {"QuantisedLinear": 3, "GatedQuantisedLinear": 1, "RMSNorm": 2},
    "int8": {"QuantisedLinear": 3, "GatedQuantisedLinear": 1, "QuantisedRMSNorm": 2, "QuantiseTokens": 1, "RMSNorm": 0},
}


@pytest.mark.parametrize("name", FEW_BITS)
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
def test_a_quantised_plan_computes_what_its_graph_does(model, name, tmp_path):
    """Weights as the engine's file has them, packed; activations may be rounded to a neighbour here and there.

    Now and then one is that moves a sequence by some percent; what is computed wrong moves all of them.
    """
    save_graph(quantised(model, name), tmp_path)
    graph, stored = load_graph(tmp_path), open_weights(tmp_path)
    fused = fuse(graph.graph)
    ops = [node.op_type for node in fused]
    assert "DequantizeLinear" not in ops and "Linear" not in ops and ops.count("RotaryPagedAttention") == LAYERS
    for op, count in EXPECTED.get(name, {}).items():
        extra = op in ("QuantisedLinear", "RMSNorm" if name == "int4" else "QuantisedRMSNorm")  # head, last norm
        assert ops.count(op) == count * LAYERS + extra, (op, ops)
    planner = Planner(fused, Device(90, 8), PAGE_SIZE, WIDTH, 4, quickest)
    buckets = tuple(planner.plan(sizes) for sizes in SIZES)
    fields = planner.vocab_size, PAGE_SIZE, WIDTH, planner.logits_dtype, planner.nodes, (), buckets, (), planner.zeros
    Plan(90, *fields).save(tmp_path)
    plan = Plan.open(tmp_path)
    program = Program(graph, stored)
    counts = [-(-(n + 1) // PAGE_SIZE) for n in PROMPTS]
    pages = torch.zeros(len(PROMPTS), max(counts), dtype=torch.int32)
    for row, owned in zip(pages, (torch.randperm(sum(counts)) + 1).split(counts), strict=True):
        row[: len(owned)] = owned
    pools = [
        {value.name: torch.full((sum(counts) + 1, PAGE_SIZE, *gate._numbers(value)), torch.nan)
         for value in graph.graph.inputs if value.name not in step.STEP_INPUTS}
        for _ in range(2)
    ]  # fmt: skip
    prompts = [torch.randint(3, 300, (n + 1,)) for n in PROMPTS]
    spans = [(s, 0, n) for s, n in enumerate(PROMPTS)], [(s, n, n + 1) for s, n in enumerate(PROMPTS)]
    changes = []  # relative, of each sequence in each step
    for bucket, span in zip(plan.buckets, spans, strict=True):
        inputs = {key: tensor.to(torch.int32) for key, tensor in step_inputs(span, prompts, pages, PAGE_SIZE).items()}
        expected = program({**inputs, **pools[0]})[step.LOGITS]
        run = PlanRun(plan, planner.kernels, bucket, {**stored, **padded(inputs, bucket, WIDTH), **pools[1]})
        run()
        found = run.logits(expected.shape[1])[: len(expected)]
        changes.append((found - expected).norm(dim=1) / expected.norm(dim=1))
    changes = torch.cat(changes).sort().values  # NaN last
    few, most = (2e-2, 0.15) if FEW_BITS[name][1] else (1e-4, 1e-4)
    assert changes[1] < few and changes[-1] < most, changes


def test_fp8_products_are_refused_where_no_gpu_has_them(model, tmp_path):
    """By the recipe, before anything is exported, and by the graph, for an engine that is compiled anew."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(ALL % "{dtype: fp8_e4m3}, activation: {dtype: fp8_e4m3}")
    config = BuildConfig("", "", "cuda", quant=str(recipe), gpu_arch=80)
    with pytest.raises(BuildError, match="from compute capability 8.9 on, but this build is for 8.0"), begin(config):
        pass
    graph = quantised(model, "fp8").graph
    with pytest.raises(BuildError, match="from compute capability 8.9 on"):
        make_plan(graph, 64, tmp_path, Device(80, 108), config, None)
