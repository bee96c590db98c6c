"""A calibration that is stopped, at whatever node and however, goes on and finds the same numbers."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ingot.builder import journal
from ingot.builder.calibrate import calibrate
from ingot.builder.journal import Journal, Kept
from ingot.builder.node_major import run
from ingot.calibration.recipe import parse
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from tiny_llama import text, tiny

RULES = """{perplexity: 10, rules: [
  {match: '*.qkv', method: gptq, format: {dtype: int4, group: 16, symmetric: false}, act_order: true},
  {match: '*down*', method: rtn, format: {dtype: int8}, activation: {dtype: int8, rows: 0}},
  {match: '*', method: gptq, format: {dtype: fp8_e4m3}}]}"""
RECIPE = parse(RULES, "mine", "mine.yaml")
ABOUT = {"model": "m", "recipe": RULES, "text": "t"}


@pytest.fixture(scope="module")
def graph():
    return tiny()


@pytest.fixture(scope="module")
def whole(graph):
    """What a calibration finds that nobody stops, and how it counts its nodes."""
    nodes = []
    found = calibrate(graph, RECIPE, text(), lambda done, total, name: nodes.append((done, total, name)))
    assert sorted(done for done, *_ in nodes) == [done for done, *_ in nodes] and nodes[-1][0] == nodes[-1][1]
    assert {name for *_, name in nodes} - {""} == {layer.name for layer in found[1].layers}
    return *found, [done for done, *_ in nodes]


def same(found, whole):
    scales, accuracy = found
    assert accuracy.describe() == whole[1].describe()
    assert scales.activations == whole[0].activations and scales.activations
    assert scales.weights.keys() == whole[0].weights.keys() and scales.weights
    for name, quantised in whole[0].weights.items():
        assert torch.equal(scales.weights[name].dequantise(), quantised.dequantise()), name


def every_node(monkeypatch):
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr(journal, "SHARE", 1e9)


@pytest.mark.parametrize("often", [False, True], ids=["at-the-end", "every-node"])
def test_stopped_at_any_node(graph, whole, tmp_path, monkeypatch, often):
    if often:
        every_node(monkeypatch)
    folder, order, begins = tmp_path / "e.calibration", whole[2], None
    n = len(order)
    for stop in (order[4], order[n // 3], order[n // 3], order[2 * n // 3], order[-2]):  # twice at one
        begun = []

        def on_node(done, total, name, begun=begun, stop=stop):
            begun.append(done)
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), Journal(folder, ABOUT) as kept:
            calibrate(graph, RECIPE, text(), on_node, journal=kept)
        assert begun[0] == (begins or 0) and begun[-1] == stop
        begins = stop
    notes = []
    with Journal(folder, ABOUT, notes.append) as kept:
        same(calibrate(graph, RECIPE, text(), journal=kept), whole)
        with pytest.raises(BuildError, match="in use by another process"):
            Journal(folder, ABOUT)
    assert not folder.exists() and len(notes) == 1 and "going on with what" in notes[0]


def test_weights_are_found_once(graph, whole, tmp_path, monkeypatch):
    """Without any snapshot, as after a kill in the first seconds, what was found still is."""
    folder, order = tmp_path / "e.calibration", whole[2]
    monkeypatch.setattr(Kept, "save", lambda *_: None)

    def on_node(done, total, name):
        if done == order[len(order) * 3 // 4]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Journal(folder, ABOUT) as kept:
        calibrate(graph, RECIPE, text(), on_node, journal=kept)
    searched = []
    monkeypatch.setattr("ingot.builder.calibrate.gptq", lambda *a, **k: searched.append(a) or real(*a, **k))
    with Journal(folder, ABOUT) as kept:
        before = len(kept.scales.weights)
        same(calibrate(graph, RECIPE, text(), journal=kept), whole)
    assert before and len(searched) == len(whole[0].weights) - before


real = __import__("ingot.builder.calibrate", fromlist=["gptq"]).gptq


def test_killed(graph, whole, tmp_path):
    """SIGKILL in the middle of a node, in a process of its own, some nodes after the last snapshot."""
    folder, order = tmp_path / "e.calibration", whole[2]
    stop = order[len(order) * 4 // 5]
    child = subprocess.run([sys.executable, __file__, str(folder), str(stop)], env={
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads()),
    })  # fmt: skip
    assert child.returncode == -signal.SIGKILL and list(folder.glob("walk-*-alive.safetensors"))
    begun = []
    with Journal(folder, ABOUT) as kept:
        same(calibrate(graph, RECIPE, text(), lambda done, *_: begun.append(done), journal=kept), whole)
    assert stop - 3 <= begun[0] <= stop


def test_what_is_of_something_else_is_not_used(graph, whole, tmp_path):
    folder, notes = tmp_path / "e.calibration", []
    with pytest.raises(KeyboardInterrupt), Journal(folder, ABOUT) as kept:
        calibrate(graph, RECIPE, text(), journal=kept)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Journal(folder, ABOUT | {"text": "u", "model": "n"}, notes.append) as kept:
        assert not kept.layers and not kept.scales.weights and not kept.accuracy
        calibrate(graph, RECIPE, text(), journal=kept)
        raise KeyboardInterrupt
    assert notes == [f"{folder} is of another calibration (differs: model, text), so this one begins anew."]
    shutil.copytree(folder, tmp_path / "copy")
    for damage in (lambda data: data[:-100], lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]):
        shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
        found = next(path for path in sorted(folder.glob("found-*")) if Scales.open(path).weights)
        found.write_bytes(damage(found.read_bytes()))
        with Journal(folder, ABOUT | {"text": "u", "model": "n"}, notes.append) as kept:
            assert not kept.layers
        assert "what is in it is damaged" in notes.pop() and not folder.exists()


def test_what_can_be_had_again_may_be_damaged(graph, whole, tmp_path, monkeypatch):
    """As after a loss of power: what was found is used, walks whose files are not whole are begun anew."""
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr(journal, "SHARE", 1e9)
    folder, stop = tmp_path / "e.calibration", whole[2][len(whole[2]) * 4 // 5]

    def stopped(done, *_):
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Journal(folder, ABOUT) as kept:
        calibrate(graph, RECIPE, text(), stopped, journal=kept)
    files = sorted(path.name for path in folder.glob("walk-*"))
    assert {name.split("-")[1] for name in files} == {"before", "after"}
    shutil.copytree(folder, tmp_path / "kept")
    for name in [*files[:1], *files[-1:], "mixed.json"]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", folder)
        (folder / "mixed.json").write_text("{}")
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        notes = []
        with Journal(folder, ABOUT, notes.append) as kept:
            assert not (folder / name).exists() and kept.remembered("mixed") == (None if name == "mixed.json" else {})
            same(calibrate(graph, RECIPE, text(), journal=kept), whole)
        assert len(notes) == 1 and "going on with what" in notes[0]


def test_a_finished_one_is_done_at_once(graph, whole, tmp_path):
    """As after a build that was refused for its accuracy: with --accept-accuracy it has nothing to do."""
    folder = tmp_path / "deep" / "e.calibration"
    with pytest.raises(BuildError), Journal(folder, ABOUT) as kept:
        calibrate(graph, RECIPE, text(), journal=kept)
        raise BuildError("too bad")
    with Journal(folder, ABOUT) as kept:
        same(calibrate(graph, RECIPE, text(), lambda *_: pytest.fail("it walks"), journal=kept), whole)
    assert folder.parent.is_dir(), "that was there before this one"
    with pytest.raises(BuildError), Journal(tmp_path / "new" / "er" / "e.calibration", ABOUT):
        raise BuildError("no such recipe")
    assert list(tmp_path.iterdir()) == [folder.parent] and not folder.exists()


def test_a_full_disk_loses_nothing(graph, whole, tmp_path, monkeypatch):
    """What was found stays for when there is room; and where there is none from the start, nothing is in the way."""
    folder, num = tmp_path / "e.calibration", itertools.count()
    save = Scales.save

    def full(path, *_):
        path.with_name(f"{path.name}.part").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Scales, "save", lambda scales, path: save(scales, path) if next(num) < 5 else full(path))
    with pytest.raises(BuildError, match="free some space"), Journal(folder, ABOUT) as kept:
        calibrate(graph, RECIPE, text(), journal=kept)
    monkeypatch.setattr(Scales, "save", save)
    assert not list(folder.glob("walk-*"))
    notes = []
    with Journal(folder, ABOUT, notes.append) as kept:
        same(calibrate(graph, RECIPE, text(), journal=kept), whole)
    assert "going on with what" in notes[0]
    folder.mkdir()
    (folder / "about.json.part").write_text("")
    with Journal(folder, ABOUT):
        pass
    assert not folder.exists()


def test_a_folder_that_is_in_the_way(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(BuildError, match="is in the way of what a calibration keeps"):
            Journal(place, ABOUT)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    with pytest.raises(BuildError, match=r"cannot be written \(.*\); give `-o` another place"):
        Journal(tmp_path / "thesis.tex" / "e", ABOUT)


def test_scales_are_written_from_the_journal(graph, whole, tmp_path):
    with Journal(tmp_path / "e.calibration", ABOUT) as kept:
        scales, _ = calibrate(graph, RECIPE, text(), journal=kept)
        scales.save(tmp_path / "scales.safetensors")
    same((type(scales).open(tmp_path / "scales.safetensors"), whole[1]), whole)


@pytest.mark.gpu
def test_on_a_gpu(graph, whole):
    found = [logits for logits in run(graph, text().held_out, device="cuda")]
    for ours, theirs in zip(found, run(graph, text().held_out), strict=True):
        assert ours.device.type == "cpu"
        assert (ours - theirs).norm() / theirs.norm() < 2e-2  # the model is in bf16, and sums are in another order
    _, accuracy = calibrate(graph, RECIPE, text(), device="cuda")
    assert accuracy.kl == pytest.approx(whole[1].kl, rel=0.2)
    assert [asdict(layer)["name"] for layer in accuracy.layers] == [layer.name for layer in whole[1].layers]


if __name__ == "__main__":
    folder, stop = Path(sys.argv[1]), int(sys.argv[2])

    def on_node(done, total, name):
        if done == stop:  # as if between two snapshots
            os.kill(os.getpid(), signal.SIGKILL)

    kept, last = Journal(folder, ABOUT), []
    Kept.due = lambda self: last.append(0) or len(last) % 3 == 0  # every third node
    sys.exit(calibrate(tiny(), RECIPE, text(), on_node, journal=kept) and 1)
