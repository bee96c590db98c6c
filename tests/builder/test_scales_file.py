"""`ingot calibrate` and `build-engine --scales`: what is found is kept, shown, used without a search, or refused; and
the picture of the accuracy."""

import errno
import json
import os
import shutil
import sys
from dataclasses import asdict, replace

import pytest
import torch
from calibrated import RECIPES, calibrated
from hand_made import DEMO
from ingot import BuildConfig, build_engine
from ingot import __main__ as cli
from ingot.builder import find_scales
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.fingerprint import fingerprint
from ingot.builder.kv_cache import quantise_pools
from ingot.builder.picture import draw_accuracy
from ingot.builder.quantise import quantise
from ingot.calibration.accuracy import Accuracy, Layer
from ingot.calibration.recipe import KV_CACHES, Recipe, kv_recipes
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from ingot.engines.extras import pip_install
from ingot.engines.manifest import Manifest
from ingot.engines.weights import open_weights, write_weights
from ingot.plugins.onnx_quantise import unpack_int4
from random_graph import random_graph
from safetensors.torch import load_file, save_file

DRAFT = DEMO / "pycoder-draft-2m"
RECIPE = """{perplexity: 0.9, rules: [{match: '*.mlp.*', method: gptq, format: {dtype: int4, group: 64}},
  {match: '*.layers.1.*', method: keep}, {match: '*', method: rtn, format: {dtype: int8}}],
  mixed: {budget: 5.7, instead: [{method: rtn, format: {dtype: int8}}]}}"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(config, file of scales, what was said on the way) of a small calibration with a mixed recipe."""
    folder = tmp_path_factory.mktemp("scales")
    (folder / "mine.yaml").write_text(RECIPE)
    files = sorted((DEMO.parents[1] / "runtime").glob("*.py"))
    (folder / "text.txt").write_text("\n".join(path.read_text() for path in files)[:40_000])
    config = BuildConfig(
        str(DRAFT), str(folder / "scales.safetensors"), quant=str(folder / "mine.yaml"), calibration_width=64,
        calibration_data=str(folder / "text.txt"), calibration_tokens=1024,
    )  # fmt: skip
    nodes, notes = [], []

    def stop(done, total, name):
        nodes.append((done, total, name))
        if len(nodes) == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_scales(config, None, stop, notes.append)
    assert (folder / "scales.safetensors.calibration" / "mixed.json").is_file() and not notes
    find_scales(config, None, lambda *node: nodes.append(node), notes.append)
    assert len(notes) == 1 and "going on with" in notes[0] and nodes[60] == nodes[59], "where it was stopped"
    return config, folder / "scales.safetensors", nodes


def build(config, out, **options):
    kept = {"quant": config.quant, "scales": config.out, **options}
    return build_engine(BuildConfig(str(options.pop("model", DRAFT)), str(out), **{k: v for k, v in kept.items()
                                                                                  if k != "model"}))  # fmt: skip


def test_what_is_found(found):
    config, path, nodes = found
    scales = Scales.open(path)
    assert not path.with_name("scales.safetensors.calibration").exists()
    mixed = scales.about["mixed"]
    assert mixed and set(scales.weights) == {
        name for i in range(2) for part in ("gate_proj+up_proj", "down_proj")
        if (name := f"model.layers.{i}.mlp.{part}.weight") not in mixed
    }  # fmt: skip
    accuracy = Accuracy.of(scales.about["accuracy"])
    assert accuracy.num_tokens == 4 * 63 and 0 < accuracy.kl < 1
    assert nodes[-1][0] == nodes[-1][1] and {name for *_, name in nodes} > {layer.name for layer in accuracy.layers}
    with pytest.raises(BuildError, match="is there already; pass --force"):
        find_scales(config)
    (path.parent / "link").symlink_to(path)
    os.mkfifo(path.parent / "pipe")
    for odd in ("link", "pipe"):
        with pytest.raises(BuildError, match=f"{odd} is a symbolic link or a device, which is not replaced"):
            find_scales(replace(config, out=str(path.parent / odd), force=True))
    with pytest.raises(BuildError, match="is a directory, or in none"):
        find_scales(BuildConfig(str(DRAFT), str(path.parent / "no" / "s.safetensors"), quant="w8a16"))


def test_a_build_with_scales_searches_for_nothing(found, tmp_path, monkeypatch):
    config, path, _ = found
    monkeypatch.setattr("ingot.builder.quantisation.calibrate", lambda *_, **__: pytest.fail("it searches"))
    build(config, tmp_path / "engine")
    scales, weights = Scales.open(path), open_weights(tmp_path / "engine")
    record = Manifest.open(tmp_path / "engine").quantisation
    assert record["accuracy"] == scales.about["accuracy"] and record["text"] == scales.about["text"]
    assert record["recipe"] == "mine" and len(record["rules"]) == len(scales.about["mixed"]) + 3
    for name, quantised in scales.weights.items():
        stored = unpack_int4(weights[f"{name}.quantised"], tuple(quantised.values.shape))
        assert torch.equal(stored, quantised.values)
        assert torch.equal(weights[f"{name}.scale"], quantised.scale)
    for name in scales.about["mixed"]:
        assert weights[f"{name}.quantised"].dtype == torch.int8
    assert not (tmp_path / "engine.calibration").exists()
    assert "accuracy.png" in Manifest.open(tmp_path / "engine").files


def test_scales_of_something_else(found, tmp_path):
    config, path, _ = found
    with pytest.raises(BuildError, match="are of another recipe; give --quant mine, or find"):
        build(config, tmp_path / "e", quant="w8a16")
    for recipe, options in (
        (kv_recipes()["fp8"], "--kv-cache fp8"),
        (replace(Recipe.open("w8a16"), kv_cache=KV_CACHES["int8-head"]), "--quant w8a16 --kv-cache int8-head"),
    ):
        other = Scales.open(path)
        other.about["recipe"] = asdict(recipe)
        other.save(tmp_path / "other.safetensors")
        with pytest.raises(BuildError, match=f"are of another recipe; give {options}, or find"):
            build(config, tmp_path / "e", scales=str(tmp_path / "other.safetensors"))
    shutil.copytree(DRAFT, tmp_path / "model")
    tensors = load_file(DRAFT / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(BuildError, match="are of another model; give the checkpoint that they were found for"):
        build(config, tmp_path / "e", model=tmp_path / "model")
    with pytest.raises(BuildError, match="--scales is for quantised builds"):
        build(config, tmp_path / "e", quant="")
    with pytest.raises(BuildError, match="is not a file of scales"):
        build(config, tmp_path / "e", scales=config.calibration_data)
    bare = Scales.open(path)
    del bare.about["accuracy"]
    bare.save(tmp_path / "bare.safetensors")
    with pytest.raises(BuildError, match="does not say how accurate .*--calibration-data to measure it"):
        build(config, tmp_path / "e", scales=str(tmp_path / "bare.safetensors"))
    chosen = next(iter(Scales.open(path).about["mixed"]))
    for mixed in ({chosen: 1}, {chosen: "rtn"}, {"nobody": 0}):
        odd = Scales.open(path)
        odd.about["mixed"] = mixed
        odd.save(tmp_path / "odd.safetensors")
        with pytest.raises(BuildError, match="choose weights for `mixed` that there are not"):
            build(config, tmp_path / "e", scales=str(tmp_path / "odd.safetensors"))
    assert not (tmp_path / "e").exists()


def test_scales_of_another_shape():
    """Nothing of them is written, or fails when it is: a file that was put together may hold any."""
    recipe = RECIPES["many"]
    scales = calibrated(recipe, "cpu")
    odd = {"clipping": torch.ones(1), "activations": torch.ones(3), "kv": torch.ones(1)}
    for kind, tensor in odd.items():
        wrong = replace(scales, **{kind: dict(getattr(scales, kind))})
        name = next(name for name in getattr(wrong, kind) if "pages" not in name)
        getattr(wrong, kind)[name] = tensor
        with pytest.raises(BuildError, match=f"{name.replace('+', '.')}.*calibrate anew"):
            graph = random_graph("llama")
            quantise(graph, recipe, wrong)
            quantise_pools(graph, recipe.kv_cache.dtype, wrong.kv)


def test_a_disk_that_is_full_at_the_end(found, tmp_path, monkeypatch):
    """One sentence, and what was found is there for the next try."""

    def full(path, *_, **__):
        if path.parent == tmp_path:
            path.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_weights(path, *_, **__)

    monkeypatch.setattr("ingot.calibration.scales.write_weights", full)
    with pytest.raises(BuildError, match="cannot be written .*; free some space"):
        find_scales(replace(found[0], out=str(tmp_path / "scales.safetensors")))
    assert (tmp_path / "scales.safetensors.calibration" / "accuracy.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["scales.safetensors.calibration"]


def test_a_device_that_is_not_there(found, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, words in (("cuda", "there is no GPU here"), ("tpu", "device tpu was asked for; expected auto, cpu")):
        with pytest.raises(BuildError, match=words):
            build(found[0], tmp_path / "e", calibration_device=device)


def test_a_model_has_one_fingerprint(tmp_path):
    shutil.copytree(DRAFT, tmp_path / "model")
    known = fingerprint(Checkpoint.open(str(DRAFT)))
    assert fingerprint(Checkpoint.open(str(tmp_path / "model"))) == known
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    assert fingerprint(Checkpoint.open(str(tmp_path / "model"))) != known


def test_the_command_line(found, capsys, monkeypatch):
    config, path, _ = found
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.run(cli.app, "ingot", ["calibrate", *map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    code, out, _ = run("--show", path)
    assert code == 0 and "recipe mine" in out and "int4 weight, groups of 64" in out and "perplexity" in out
    code, out, _ = run("--show", path, "--json")
    shown = json.loads(out)
    assert shown["about"] == Scales.open(path).about and shown["holds"][0]["smallest"] > 0
    ready = [DRAFT, "-o", path, "--quant", config.quant]
    for arguments, words in (
        (["--show", path, DRAFT], "neither of them"), ([], "Give MODEL"), (ready[:1], "Give -o FILE"),
        (ready[:3], "Give --quant"), (ready, "Give --calibration-data"),
        ([*ready, "--calibration-data", config.calibration_data], "--force"),
    ):  # fmt: skip
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1


# -- the picture -------------------------------------------------------------------------------------------------------


def quantised(perplexity, num_layers=30):
    layers = tuple(Layer(f"model.layers.{i}.mlp.weight", "rtn int8", 0.01 * i) for i in range(num_layers))
    return {"recipe": "mine", "bound": 0.01, "accuracy": Accuracy(99, 4.0, perplexity, 0.1, 0.9, layers).describe()}


@pytest.mark.parametrize("perplexity", [4.02, 4.5, 1e9, float("nan")])
def test_the_picture(tmp_path, perplexity):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = draw_accuracy(quantised(perplexity), tmp_path)
    image = imread(path)[..., :3]
    assert path.name == "accuracy.png" and image.shape[1] > 1000
    red = (image[..., 0] > 0.7) & (image[..., 1] < 0.3) & (image[..., 2] < 0.3)
    assert (red.sum() > 1000) == (perplexity > 4.04), "a bar over the bound is red"


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    notes = []
    assert draw_accuracy(quantised(4.0), tmp_path, notes.append) is None
    assert notes == [f"the accuracy is not drawn: it needs matplotlib; install it with {pip_install('bench')}."]
    assert not list(tmp_path.iterdir())
