"""The tensorrt target with the real TensorRT for RTX, which builds engines on a machine without a GPU."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import pytest
import torch
from fake_driver import FakeDriver
from ingot import BuildConfig
from ingot.builder.targets import target_of, tensorrt
from ingot.builder.targets.tensorrt import direct_file, plan_file
from ingot.builder.targets.tensorrt.direct_file import DirectFile
from ingot.builder.targets.tensorrt.lowering import LOWERINGS
from ingot.builder.targets.tensorrt.timing_cache import KeptCache
from ingot.calibration.recipe import Recipe, parse
from ingot.engines.cli import show
from ingot.engines.errors import BuildError
from ingot.engines.inspect import describe
from ingot.engines.plan import Plan
from ingot.engines.tensorrt import ENGINE_FILE, FOLDER
from ingot.plugins import gpu as gpus
from ingot.plugins.tensorrt import flavour
from ingot.plugins.tensorrt.log import Log
from tensorrt_build import (
    CAPABILITIES,
    MODELS,
    PRECISIONS,
    SIZES,
    checkpoint_of,
    compile_for,
    in_precision,
    quantised,
    write_graph,
)
from tensorrt_run import without_cubins

pytest.importorskip("tensorrt_rtx_bindings")
pytest.importorskip("triton")

REAL = ("mistral", "fp8", 89)  # the build whose kernels are compiled, as all are (`tests/plugins`)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """name -> (folder with model.onnx and weights, ModelInfo), exported when first asked for."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name) / "graph"
            folder.mkdir()
            known[name] = folder, write_graph(checkpoint_of(name, folder.parent / "checkpoint"), folder)
        return known[name]

    return get


@pytest.fixture(scope="module")
def built(graphs, tmp_path_factory):
    """(model, precision, architecture) -> its engine."""
    known = {}

    def get(*key):
        if key not in known:
            name, precision, capability = key
            source, model = graphs(name)
            folder = tmp_path_factory.mktemp("-".join(map(str, key))) / "engine"
            in_precision(name, precision, source, folder)
            with pytest.MonkeyPatch.context() as patch:
                if key != REAL:
                    without_cubins(patch)  # TensorRT never sees them
                known[key] = compile_for(folder, model, capability)
        return known[key]

    return get


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_attention_layer_is_a_plugin_and_products_are_of_what_is_stored(built, name, precision, capability):
    engine = built(name, precision, capability)
    assert (engine.folder / FOLDER / ENGINE_FILE).stat().st_size == engine.info["plan_bytes"] > 100_000
    assert engine.info["capability"] == capability
    num_layers, num_profiles = engine.manifest.model.num_layers, len(engine.plugins.profiles)
    for profile in range(num_profiles):
        found = [layer for layer in engine.attention if layer["profile"] == profile]
        assert len(found) == num_layers and len({layer["nodes"][0] for layer in found}) == num_layers
    assert all(("FP8" in layer["reads"]) == (precision == "fp8") for layer in engine.attention), "its pages"
    assert len(engine.fused) > len(engine.attention), "TensorRT fused around the plugins"
    assert not any("Reformat" in layer["type"] for layer in engine.layers), "no pool is copied"
    products = {kind: len(layers) for kind, layers in engine.products.items()}
    wanted = {"fp8": "FP8", "int4": "Int4"}.get(precision)
    assert all((count >= 4 * num_layers * num_profiles) == (kind == wanted) for kind, count in products.items())


def test_quantised_weights_stay_small(built):
    """TensorRT keeps the numbers as they are stored; only the embedding (which is the head) is as large as before."""
    whole, *others = (built("pycoder-14m", precision, 89).info["plan_bytes"] for precision in PRECISIONS)
    assert all(plan_bytes < 0.75 * whole for plan_bytes in others)


EVERY_FORM = """
perplexity: 1
rules:
  - {match: "*embed*", method: rtn, format: {dtype: int8}}
  - {match: "*o_proj*", method: rtn, format: {dtype: int4, group: 32, symmetric: false}}
  - {match: "*down_proj*", method: rtn, format: {dtype: fp8_e4m3, group: 32}, activation: {dtype: fp8_e4m3, group: 32}}
  - {match: "*gate*", method: rtn, format: {dtype: int8}, activation: {dtype: int8}}
  - {match: "*", method: rtn, format: {dtype: fp8_e4m3}}
"""


@pytest.mark.parametrize("recipe, plugins, products", [
    (parse(EVERY_FORM, "every form", ""), "Rope", {"Int8": 4, "Int4": 4}),
    (Recipe.open("fp8"), "QuantiseTokens", {"Int8": 0, "Int4": 0, "FP8": 16}),
    (Recipe.open("fp8"), ",".join(LOWERINGS), {"Int8": 0, "Int4": 0, "FP8": 0}),
])  # fmt: skip
def test_other_forms_and_ops_that_stay_plugins(graphs, monkeypatch, tmp_path, recipe, plugins, products):
    """Which TensorRT takes, with pages of INT8; what each means is in `tests/plugins/test_tensorrt_adapter.py`."""
    without_cubins(monkeypatch)
    source, model = graphs("mistral")
    quantised(source, tmp_path, recipe, "int8")
    engine = compile_for(tmp_path, model, 89, tensorrt_plugins=plugins)
    assert products.items() <= {kind: len(layers) for kind, layers in engine.products.items()}.items()
    assert len(engine.attention) == 4 and all("Int8" in layer["reads"] for layer in engine.attention)
    asked = set(plugins.split(",")) - {"Rope"}
    assert engine.info["plugins"].keys() >= asked and "Rope" not in engine.info["plugins"]


def test_the_plan_beside_it_and_what_inspect_says(built, capsys):
    engine = built(*REAL)
    plan = Plan.open(engine.folder / FOLDER)
    assert all(set(bucket.parts) >= {"stage", "sample.greedy"} for bucket in plan.buckets)
    assert all((engine.folder / FOLDER / cubin.file).read_bytes()[:4] == b"\x7fELF" for cubin in plan.cubins)
    assert sorted(bucket for group in engine.plugins.profiles for bucket in group) == list(range(len(plan.buckets)))
    facts = describe(engine.folder, engine.manifest)
    show(facts | {"verified": True})
    text = " ".join(capsys.readouterr().out.split())
    assert "RotaryPagedAttention" in text and "1.7" in text and "of plan" in text
    assert facts["tensorrt"]["plan_bytes"] == engine.info["plan_bytes"]
    assert all(profile["stored"]["FP8"] >= 8 for profile in facts["tensorrt"]["profiles"])
    assert len(facts["tensorrt"]["profiles"]) == len(engine.plugins.profiles)


def test_memory_is_announced_and_progress_counted(built):
    engine = built(*REAL)
    (note,) = engine.notes  # before it starts
    (weights,) = (path.stat().st_size for path in engine.folder.glob("weights.safetensors"))
    assert note.startswith(f"TensorRT will take up to {plan_file.expected_bytes(weights) / 2**30:.1f} GiB of memory")
    assert plan_file.expected_bytes(2 * 8_030_261_248) < 24 * 2**30, "Llama 3 8B in bf16"
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


@pytest.mark.parametrize("options", [dict(quant="fp8"), dict(quant="fp8-static"), dict(kv_cache="fp8-head")])
def test_fp8_where_there_is_none(options):
    with pytest.raises(BuildError, match="FP8 from compute capability 89 on, .* is for 86; .*int8-sq.*--kv-cache int8"):
        begin(gpu_arch=86, **options)


def test_a_graph_in_fp8_where_there_is_none(graphs, tmp_path):
    """As a checkpoint may be."""
    source, model = graphs("mistral")
    in_precision("mistral", "fp8", source, tmp_path / "engine")
    with pytest.raises(BuildError, match="FP8 from compute capability 89 on, .* is for 80"):
        compile_for(tmp_path / "engine", model, 80)


def test_full_tensorrt_builds_for_the_gpu_at_hand(monkeypatch):
    """As it is told from TensorRT for RTX: by what the module has."""
    monkeypatch.setattr(flavour, "chooses_capability", lambda: False)
    if not torch.cuda.is_available():
        with pytest.raises(BuildError, match="for the GPU at hand alone, and .*; build where the engine is to run"):
            begin()
    monkeypatch.setattr(gpus, "_driver", FakeDriver)  # an H100
    with pytest.raises(BuildError, match="the GPU at hand, .* of 90, and not for 89; leave --gpu-arch out"):
        begin(gpu_arch=89)
    begin(gpu_arch=90)


def test_timings_are_kept_for_the_next_build(monkeypatch, tmp_path):
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path))
    given = []
    config = SimpleNamespace(
        create_timing_cache=lambda known: known, set_timing_cache=lambda cache, ignore: given.append((cache, ignore)),
        get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timed"),
    )  # fmt: skip
    for _ in range(2):
        cache = KeptCache.of(90)
        cache.give_to(config)
        cache.take_from(config)
    assert given == [(b"", False), (b"timed", False)] and "-sm90" in cache.path.name
    assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name], "nothing half written is left"
    cache.path.unlink()
    cache.path.mkdir()
    with pytest.warns(UserWarning, match="timings are not kept"):
        cache.take_from(config)


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
        without_cubins(patch)
        patch.setattr(tensorrt, "lower", lower)
        compile_for(folder, model, 89)


def test_out_of_memory_is_one_sentence():
    log = Log()
    log.lines.append(("ERROR", "Error Code 1: Cuda Runtime (CUDA driver version is insufficient)"))
    assert not log.errors and not log.out_of_memory
    log.lines.append(("ERROR", "IBuilder::build: Error Code 2: OutOfMemory (std::bad_alloc\n in x)"))
    assert log.out_of_memory
    assert "ran out of memory" in str(plan_file._failed(log))


def test_a_full_disk_ends_the_build(graphs, tmp_path, monkeypatch):
    """TensorRT itself takes a write that failed for one that did not."""
    source, model = graphs("mistral")
    shutil.copytree(source, tmp_path / "engine")

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    without_cubins(monkeypatch)
    monkeypatch.setattr(DirectFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        compile_for(tmp_path / "engine", model, 89)


@pytest.mark.parametrize("refuses", ["", "open", "write"])
@pytest.mark.parametrize("sizes", [[], [1], [4096], [9000, 0, 3, 70_000, 1], [8192, 8192, 8191], [200_001] * 3])
def test_a_direct_file_holds_what_was_written(tmp_path, monkeypatch, refuses, sizes):
    """Also on file systems that do not take direct writes, and where a write takes less than it was given."""
    monkeypatch.setattr(direct_file, "BUFFER_BYTES", 8192)
    os_open, os_write = os.open, os.write

    def open_file(path, flags, mode):
        if refuses == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os_open(path, flags, mode)

    def write(file, data):
        if refuses == "write" and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os_write(file, data[:4096])

    monkeypatch.setattr(direct_file, "os", SimpleNamespace(**vars(os) | {"open": open_file, "write": write}))
    pieces = [os.urandom(size) for size in sizes]
    (tmp_path / "plan").write_bytes(b"what was there before" * 10_000)
    with DirectFile(tmp_path / "plan") as file:
        assert [file.write(piece) for piece in pieces] == sizes
    assert (tmp_path / "plan").read_bytes() == b"".join(pieces)


def test_a_direct_file_says_what_the_disk_says(tmp_path):
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "no folder" / "plan")
    with pytest.raises(OSError, match="No space"), DirectFile(Path("/dev/full")) as file:
        file.write(b"some")
    with pytest.raises(KeyError), DirectFile(tmp_path / "plan") as file:
        file.write(b"some")
        raise KeyError
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # another thread's may be gone
            assert str(tmp_path / "plan") not in str(descriptor.readlink())
