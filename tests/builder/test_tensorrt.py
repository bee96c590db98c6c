"""The tensorrt target with the real TensorRT for RTX, which builds engines on a machine without a GPU."""

import shutil

import pytest
import torch
from families import FAMILIES
from hand_made import DEMO
from ingot.builder.targets import tactics
from ingot.calibration.recipe import recipes
from ingot.engines.tensorrt import ENGINE_FILE, FOLDER
from tensorrt_build import compile_for, quantised, write_graph
from transformers import AutoModelForCausalLM

pytest.importorskip("tensorrt_rtx_bindings")
pytest.importorskip("triton")

MODELS = ("pycoder-14m", "qwen3", "gemma3", "mistral")


@pytest.fixture(scope="module", autouse=True)
def each_kernel_once():
    """Models share kernels, and a process that compiles them takes a second to start: real cubins, compiled once."""
    compile_all, known = tactics.compile_all, {}

    def compiled(sources, capability):
        missing = [source for source in sources if (source, capability) not in known]
        known.update({(source, capability): found for source, found in compile_all(missing, capability).items()})
        return {source: known[source, capability] for source in sources}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tactics, "compile_all", compiled)
        yield


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """name -> (folder with model.onnx and weights, ModelInfo), exported when first asked for."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            source = DEMO / name
            if name in FAMILIES:
                torch.manual_seed(0)
                source = folder / "checkpoint"
                AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.bfloat16).save_pretrained(source)
            (folder / "graph").mkdir()
            known[name] = folder / "graph", write_graph(source, folder / "graph")
        return known[name]

    return get


@pytest.fixture(scope="module")
def built(graphs, tmp_path_factory):
    """The engine of a model for an architecture, and the graph's folder beside it."""
    known = {}

    def get(name, capability, recipe=None):
        if (name, capability, recipe) not in known:
            source, model = graphs(name)
            folder = tmp_path_factory.mktemp(f"{name}-{capability}") / "engine"
            if recipe:
                folder.mkdir()
                quantised(source, folder, next(each for each in recipes() if each.name == recipe))
            else:
                shutil.copytree(source, folder)
            known[name, capability, recipe] = compile_for(folder, model, capability)
        return known[name, capability, recipe]

    return get


@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_layer_is_a_plugin(built, name, capability):
    engine = built(name, capability)
    assert (engine.folder / FOLDER / ENGINE_FILE).stat().st_size == engine.info["plan_bytes"] > 100_000
    assert engine.info["capability"] == capability
    attentions = [node for node in engine.graph.graph if node.op_type == "PagedAttention"]
    num_profiles = len(engine.plugins.profiles)
    for profile in range(num_profiles):
        found = [layer for layer in engine.layers if layer in engine.attention and layer["profile"] == profile]
        assert len(found) == len(attentions) == engine.manifest.model.num_layers
        assert len({layer["nodes"][0] for layer in found}) == len(attentions), "each is a node of its own"
    fused = [layer for layer in engine.layers if len(layer["nodes"]) > 1]
    assert len(fused) > len(attentions), "TensorRT fused around the plugins"
    assert not any("Reformat" in layer["type"] for layer in engine.layers), "no pool is copied"


@pytest.mark.parametrize("recipe", ["int4-rtn", "w8a16-fp8"])
def test_quantised_weights_stay_small(built, recipe):
    """TensorRT keeps the numbers as they are stored; only the embedding (which is the head) is as large as before."""
    engine, whole = built("pycoder-14m", 89, recipe), built("pycoder-14m", 89)
    dequantised = [layer for layer in engine.layers if any("dequantise" in node for node in layer["nodes"])]
    assert len(dequantised) >= 4 * engine.manifest.model.num_layers
    assert engine.info["plan_bytes"] < 0.75 * whole.info["plan_bytes"]
    assert len(engine.attention) == len(whole.attention)
    if recipe == "int4-rtn":
        assert all(any("Gemm" in node for node in layer["nodes"]) for layer in dequantised), "within its product"
