"""Per family: how many nodes the passes leave, in fp32 and bf16, and that the graph still computes the same."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES
from ingot.builder import gate
from ingot.builder.export import export
from ingot.builder.passes import PASSES, optimise
from ingot.builder.passes.regions import tables_of
from ingot.builder.weights import attach
from ingot.engines.errors import BuildError

DENSE = {"Linear": 4, "RMSNorm": 2, "Rope": 1, "PagedAttention": 1, "GatedActivation": 1}
FOUR_NORMS = DENSE | {"RMSNorm": 4}
HEAD_NORMS = DENSE | {"Linear": 6, "RMSNorm": 4, "Rope": 2}  # q and k are normalised apart: q|k|v stays three products
MLP = {"Linear": 4, "LayerNormalization": 2, "Add": 2, "PagedAttention": 1}
ROUTER = {"TopK": 1, "Softmax": 1, "Experts": 1}
NORMALISED = ROUTER | {"ReduceSum": 1, "Div": 1}
COHERE = {"Linear": 4, "LayerNormalization": 1, "Add": 2, "PagedAttention": 1, "GatedActivation": 1}


def without(ops, name):
    return {op_type: count for op_type, count in ops.items() if op_type != name}


# nodes in all, and those of each kind of layer: from one attention to the next
EXPECTED = {
    "llama": (24, [DENSE]),
    "llama3_rope": (24, [DENSE]),
    "mistral": (24, [DENSE]),
    "qwen2": (24, [DENSE]),
    "qwen3": (34, [HEAD_NORMS]),
    "gemma2": (32, [FOUR_NORMS]),
    "gemma3": (104, [HEAD_NORMS | {"RMSNorm": 6}]),
    "phi3": (24, [DENSE]),
    "olmo2": (37, [HEAD_NORMS | {"Add": 2}]),  # the norm comes before the sum
    "granite": (30, [DENSE | {"Mul": 2}]),  # residual_multiplier
    "cohere2": (47, [COHERE | {"Rope": 1}, COHERE]),  # every fourth layer has no RoPE
    "glm4": (28, [FOUR_NORMS]),
    "starcoder2": (28, [MLP | {"Gelu": 1, "Rope": 1}]),
    "smollm3": (41, [DENSE, without(DENSE, "Rope")]),
    "gpt_neox": (28, [MLP | {"Gelu": 1, "Rope": 1}]),
    "gpt2": (27, [MLP | {"Gelu": 1}]),
    "opt": (28, [MLP | {"Relu": 1}]),
    "mixtral": (30, [without(DENSE, "GatedActivation") | NORMALISED | {"Linear": 3}]),
    "qwen3_moe": (40, [without(HEAD_NORMS, "GatedActivation") | NORMALISED | {"Linear": 5}]),
    "gpt_oss": (26, [without(DENSE, "GatedActivation") | ROUTER | {"Linear": 3}]),
}
# what the models themselves compute in fp32: the router's softmax, Cohere 2's rotation
CASTS_IN_BF16 = {"mixtral": (2, 1), "qwen3_moe": (4, 2), "cohere2": (1, 0)}  # in all, and in a layer


def small(family, dtype):
    """The exported graph of a random model of the family, its weights attached."""
    config = FAMILIES[family]()
    graph = export(config, dtype)
    attach(graph, gate._random_model(config).to(dtype).state_dict())
    return graph


def layer_ops(graph):
    """Ops from each attention to the next, one counter for each pair."""
    ops = [node.op_type for node in graph.graph if node.op_type != "Constant"]
    attention = [index for index, op_type in enumerate(ops) if op_type == "PagedAttention"]
    return [Counter(ops[a:b]) for a, b in zip(attention, attention[1:], strict=False)]


def kinds(layers):
    return {frozenset(layer.items()) for layer in layers}


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_left_and_what_they_compute(family):
    graph, heard = small(family, torch.float32), []
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (n,), generator=generator) for n in (19, 34, 1, 27)]
    before = gate.packed(graph, prompts)["logits"]
    optimise(graph, lambda name, num_nodes: heard.append((name, num_nodes)))
    num_nodes, layers = EXPECTED[family]
    assert kinds(layer_ops(graph)) == kinds(layers)
    assert graph.graph.num_nodes() == num_nodes
    assert [name for name, _ in heard] == [step.__name__ for step in PASSES] and heard[-1][1] == num_nodes
    for ours, exported in zip(gate.packed(graph, prompts)["logits"], before, strict=True):
        torch.testing.assert_close(ours, exported, rtol=1e-4, atol=1e-4 * float(exported.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_fuses_as_well(family):
    graph = optimise(small(family, torch.bfloat16))
    num_nodes, layers = EXPECTED[family]
    casts, casts_of_layer = CASTS_IN_BF16.get(family, (0, 0))
    more = {"Cast": casts_of_layer} if casts_of_layer else {}
    assert kinds(layer_ops(graph)) == kinds([layer | more for layer in layers])
    assert graph.graph.num_nodes() == num_nodes + casts


def test_frequencies_under_another_shape_make_tables():
    """torch 2.11 leaves the view of `inv_freq` in the graph, 2.13 folds it."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23]>
        g (int32[T] positions, float[T, 4] x) => (float[T, 4] y)
        <float[4] inv_freq = {1.0, 0.5, 0.25, 0.125}, int64[2] column = {4, 1}, int64[2] row = {1, -1}> {
            angle = Cast <to = 1> (positions)
            frequency = Reshape (inv_freq, column)
            across = Reshape (angle, row)
            angles = MatMul (frequency, across)
            turned = Transpose <perm = [1, 0]> (angles)
            cosine = Cos (turned)
            y = Mul (x, cosine)
        }""")
    tables = {value.name for value in tables_of(model, model.graph.inputs[0])}
    assert tables == {"positions", "angle", "across", "angles", "turned", "cosine"}


def test_the_graph_is_verified_after_each_pass(monkeypatch):
    graph = small("llama", torch.float32)

    def break_it(model):
        next(node for node in model.graph if node.op_type == "RMSNorm").op_type = "NoSuchOp"

    monkeypatch.setattr("ingot.builder.passes.PASSES", (*PASSES, break_it))
    with pytest.raises(BuildError, match="break_it"):
        optimise(graph)
