"""The tensorrt target with the real TensorRT for RTX, which builds engines on a machine without a GPU."""

import os
import shutil
import subprocess
import sys

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES
from hand_made import DEMO
from ingot import BuildConfig
from ingot.builder.targets import tactics, target_of, tensorrt
from ingot.builder.targets.tensorrt import plan_file
from ingot.calibration.recipe import recipes
from ingot.engines.cli import show
from ingot.engines.errors import BuildError
from ingot.engines.inspect import describe
from ingot.engines.plan import Plan
from ingot.engines.tensorrt import ENGINE_FILE, FOLDER
from ingot.plugins.tensorrt.log import Log
from tensorrt_build import SIZES, compile_for, quantised, write_graph
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


@pytest.mark.parametrize("name, capability", [*((name, 89) for name in MODELS), ("pycoder-14m", 120), ("gemma3", 120)])
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


def test_the_plan_beside_it_and_what_inspect_says(built, capsys):
    engine = built("pycoder-14m", 89)
    plan = Plan.open(engine.folder / FOLDER)
    assert all(set(bucket.parts) >= {"stage", "sample.greedy"} for bucket in plan.buckets)
    assert all((engine.folder / FOLDER / cubin.file).read_bytes()[:4] == b"\x7fELF" for cubin in plan.cubins)
    assert sorted(bucket for group in engine.plugins.profiles for bucket in group) == list(range(len(plan.buckets)))
    facts = describe(engine.folder, engine.manifest)
    show(facts | {"verified": True})
    text = " ".join(capsys.readouterr().out.split())
    assert "RotaryPagedAttention" in text and "1.7" in text and "of plan" in text
    assert facts["tensorrt"]["plan_bytes"] == engine.info["plan_bytes"]
    assert len(facts["tensorrt"]["profiles"]) == len(engine.plugins.profiles)


def test_memory_is_announced_and_progress_counted(built):
    engine = built("pycoder-14m", 89)
    (note,) = engine.notes
    assert note.startswith("TensorRT will take up to") and "GiB" in note
    assert engine.progress and all(0 <= done <= total for done, total in engine.progress)
    assert any(done == total > 0 for done, total in engine.progress)


# -- refused -----------------------------------------------------------------------------------------------------------


def begin(**options):
    with target_of("tensorrt").begin(BuildConfig("", "", **SIZES | options)):
        pass


def test_architectures_that_it_does_not_build_for():
    with pytest.raises(BuildError, match="builds for 80, 86, 89, 120, not for 90; .* install full TensorRT"):
        begin(gpu_arch=90)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_and_no_architecture():
    with pytest.raises(BuildError, match="no GPU to build for .* pass one of 80, 86, 89, 120 as --gpu-arch"):
        begin()


def test_ops_that_are_no_plugins_by_choice():
    with pytest.raises(BuildError, match="names Gather, expected some of Linear"):
        begin(gpu_arch=89, tensorrt_plugins="Rope, Gather")


def test_no_tensorrt():
    """In a process of its own, for a module is loaded once."""
    code = "from ingot.plugins.tensorrt import api; api.module()"
    env = os.environ | {"INGOT_TENSORRT": "tensorrt_of_nobody", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "none of the modules tensorrt_of_nobody is installed" in last and "pip install" in last


def test_a_layer_that_tensorrt_does_not_have(graphs, tmp_path):
    source, model = graphs("mistral")
    shutil.copytree(source, tmp_path / "engine")
    with pytest.raises(BuildError, match=r"no layer for node 'odd' \(Xor of BFLOAT16\[T,64\].*--target cuda"):
        compile_with_xor(tmp_path / "engine", model)


def compile_with_xor(folder, model):
    """Builds the lowered graph with an Xor of floats, past the checks of passes that would have refused it before."""
    real = tensorrt.lower

    def lower(lowered, plugins):
        real(lowered, plugins)
        reader = next(node for node in lowered.graph if node.op_type == "Gemm")
        made = ir.node("Xor", [reader.inputs[0], reader.inputs[0]], name="odd", num_outputs=1)
        made.outputs[0].shape, made.outputs[0].type = reader.inputs[0].shape, reader.inputs[0].type
        made.outputs[0].name = "odd"
        lowered.graph.insert_before(reader, made)
        reader.replace_input_with(0, made.outputs[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "lower", lower)
        compile_for(folder, model, 89)


def test_out_of_memory_is_one_sentence():
    log = Log()
    log.lines.append(("ERROR", "Error Code 1: Cuda Runtime (CUDA driver version is insufficient)"))
    assert not log.errors and not log.out_of_memory
    log.lines.append(("ERROR", "IBuilder::build: Error Code 2: OutOfMemory (std::bad_alloc\n in x)"))
    assert log.out_of_memory
    assert "ran out of memory" in str(plan_file._failed(log))
