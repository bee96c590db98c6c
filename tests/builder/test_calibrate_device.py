"""Calibration on a GPU, a pretended one: nothing of the host and of the device is mixed, what is kept is the host's, a
layer at a time is on the device, and what is found is what the host alone finds."""

from dataclasses import replace

import pytest
import torch
from calibrated import MANY, RECIPES, STATIC, TEXT, calibrated, tensors
from families import VOCAB
from hand_made import DEMO
from ingot.builder import BuildConfig, build_engine, find_scales, gate, quantisation
from ingot.builder.calibration_text import Text
from ingot.builder.journal import Journal
from ingot.builder.quantisation import Quantisation
from ingot.calibration.recipe import parse
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from ingot.engines.manifest import Manifest
from ingot.engines.weights import open_weights
from pretended_gpu import pretended_gpu
from random_graph import random_graph, random_windows
from tiny_llama import tiny


def same(found, expected):
    assert found.about == expected.about, "the accuracy, of each layer too"
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert type(x) is torch.Tensor and x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_same_is_found(name):
    expected = calibrated(RECIPES[name], "cpu")
    with pretended_gpu() as gpu:
        found = calibrated(RECIPES[name], "cuda")
        assert gpu.peak > 0 == gpu.alive, "nothing stays on the device"
    same(found, expected)


def test_another_graph():
    """Sinks, biases, experts, and a router that is smoothed by a Mul, since experts read the same."""
    rules = f"""{{match: '*experts*', method: rtn, format: {{dtype: int8}}}}, {{match: '*o_proj*', {STATIC}}},
      {{match: '*', method: awq, format: {{dtype: int4, group: 32}}}}"""
    recipe = parse(f"{{perplexity: 10, kv_cache: {{dtype: fp8_e4m3}}, rules: [{rules}]}}", "", "")
    graph = random_graph("gpt_oss")
    expected = calibrated(recipe, "cpu", graph=graph.clone())
    with pretended_gpu():
        same(calibrated(recipe, "cuda", graph=graph), expected)
    assert any("router" in name for name in expected.smoothing)


def test_a_layer_at_a_time_is_on_the_device():
    """More text of the same windows and more layers take no more of it."""
    rules = f"{{match: '*down*', method: gptq, format: {{dtype: fp8_e4m3}}}}, {{match: '*', {STATIC}}}"
    recipe = parse(f"{{perplexity: 10, kv_cache: {{dtype: int8}}, rules: [{rules}]}}", "", "")
    peaks = []
    for num_layers, num in ((2, 2), (2, 24), (4, 2)):
        text = Text(tuple(random_windows(8, 32, VOCAB, i) for i in range(num)), (random_windows(8, 32, VOCAB, 9),))
        with pretended_gpu() as gpu:
            calibrated(recipe, "cuda", text=text, graph=tiny(num_layers))
        peaks.append(gpu.peak)
    assert peaks[0] == peaks[1] == peaks[2]


def test_one_that_was_stopped_goes_on(tmp_path):
    expected, nodes = calibrated(RECIPES["many"], "cpu"), []
    calibrated(RECIPES["many"], "cpu", on_node=lambda *node: nodes.append(node))
    for stop in (len(nodes) // 4, len(nodes) * 2 // 3, len(nodes) - 3):

        def on_node(done, total, name, stop=stop):
            if done == nodes[stop][0]:
                raise KeyboardInterrupt

        with pretended_gpu(), pytest.raises(KeyboardInterrupt), Journal(tmp_path / "j", {}) as journal:
            calibrated(RECIPES["many"], "cuda", journal, on_node=on_node)
    with pretended_gpu(), Journal(tmp_path / "j", {}) as journal:
        same(calibrated(RECIPES["many"], "cuda", journal), expected)


def test_scales_of_a_file_are_measured(tmp_path):
    expected = calibrated(RECIPES["many"], "cpu")
    expected.save(tmp_path / "scales")
    with pretended_gpu():
        found = calibrated(RECIPES["many"], "cuda", scales=Scales.open(tmp_path / "scales"))
    for about in (found.about, expected.about):  # pools come in the order of their names
        about["accuracy"]["layers"].sort(key=lambda layer: layer["name"])
    same(found, expected)


def test_what_the_gate_refuses():
    """Recipes that it advises are tried on the device."""
    said, recipe = [], replace(RECIPES["kv-int8-head"], rules=RECIPES["int4-rtn"].rules, perplexity=1e-4)
    for device in ("cpu", "cuda"):
        graph, journal = random_graph("llama"), Journal.none()
        with pretended_gpu() as gpu, pytest.raises(BuildError) as refused:
            found = Quantisation(recipe, TEXT, False, "m", device)
            scales = found.find(graph, journal)[1]
            gpu.peak = 0
            found.apply(graph, recipe, scales, journal)
        said.append(str(refused.value))
        assert (gpu.peak > 0) == (device == "cuda")
    assert said[0] == said[1] and "lets perplexity rise by at most" in said[0]


# -- from the command on -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """A GPU for what calibrates; torch's export is not taken in by it, and the self-check is not at stake."""
    monkeypatch.setattr(gate, "self_check", lambda *_: 0.0)
    monkeypatch.setattr(quantisation, "_device", pretended_gpu()(quantisation._device))
    for name in ("find", "apply"):
        monkeypatch.setattr(Quantisation, name, pretended_gpu()(getattr(Quantisation, name)))


def test_builds_and_files_of_scales(here, tmp_path):
    no_gptq = MANY.replace("method: gptq", "method: rtn").replace("mse", "absmax")  # it takes long to pretend
    (tmp_path / "many.yaml").write_text(no_gptq)
    files = sorted((DEMO.parents[1] / "runtime").glob("*.py"))
    (tmp_path / "text.txt").write_text("\n".join(path.read_text() for path in files)[:24_000])

    options = {"calibration_data": str(tmp_path / "text.txt"), "calibration_tokens": 32, "calibration_width": 8}

    def config(out, device, **options):
        return BuildConfig(
            str(DEMO / "pycoder-draft-2m"), str(tmp_path / out), dtype="float32", quant=str(tmp_path / "many.yaml"),
            calibration_device=device, **options,
        )  # fmt: skip

    for device in ("cpu", "cuda"):
        find_scales(config(device, device, **options))
    same(Scales.open(tmp_path / "cuda"), Scales.open(tmp_path / "cpu"))
    build_engine(config("given", "cpu", scales=str(tmp_path / "cpu")))
    build_engine(config("found", "auto", **options))
    assert record(tmp_path / "found") == record(tmp_path / "given")
    ours, theirs = open_weights(tmp_path / "found"), open_weights(tmp_path / "given")
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


def record(engine):
    found = Manifest.open(engine).quantisation
    found["accuracy"]["layers"].sort(key=lambda layer: layer["name"])
    return found
