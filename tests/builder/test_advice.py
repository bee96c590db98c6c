"""What a refused build is told to do instead: measured on the same text, against the logits that are there already."""

from dataclasses import replace

import pytest
import torch
from hand_made import DEMO
from ingot.builder import calibrate as calibration
from ingot.builder.advice import check
from ingot.builder.calibrate import calibrate
from ingot.builder.calibration_text import Text
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.journal import Journal
from ingot.builder.passes import optimise
from ingot.calibration.recipe import KV_CACHES, Recipe, kv_recipes, parse
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError

HARSH = "{perplexity: 0.004, rules: [{match: '*', method: gptq, format: {dtype: int4}}]}"


@pytest.fixture(scope="module")
def model():
    return optimise(export(Checkpoint.open(str(DEMO / "pycoder-draft-2m")), torch.float32))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some of this project's own."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    files = sorted((DEMO.parents[1] / "runtime").glob("*.py"))
    path.write_text("\n".join(file.read_text(encoding="utf-8") for file in files)[:12_000], encoding="utf-8")
    return Text.read(path, Checkpoint.open(str(DEMO / "pycoder-draft-2m")))


def refused(model, recipe, text, journal):
    """What the gate advises, whatever it is."""
    scales, accuracy = calibrate(model, recipe, text, journal=journal)
    assert not accuracy.passes(recipe), accuracy.rise
    with pytest.raises(BuildError) as error:
        check(accuracy, recipe, model, text, scales, journal)
    message = str(error.value)
    assert accuracy.table() in message and message.endswith("; --accept-accuracy builds it all the same.")
    return message.splitlines()[-1]


def rise(model, recipe, text, scales=None):
    return calibrate(model, recipe, text, scales=scales)[1].rise


def spelt(rise):
    return f"stays within it ({100 * rise:+.2f}%)"


@pytest.fixture
def walks(monkeypatch):
    """Batches of each walk over the graph."""
    found, run = [], calibration.run

    def counted(model, batches, *args, **options):
        found.append(len(batches))
        return run(model, batches, *args, **options)

    monkeypatch.setattr(calibration, "run", counted)
    return found


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
def test_what_it_names_was_measured_as_a_build_would(kept, model, text, walks, tmp_path):
    harsh = parse(HARSH, "harsh", "harsh.yaml")
    journal = Journal(tmp_path / "engine.calibration", {}) if kept else Journal.none()
    said = refused(model, harsh, text, journal)
    num, all_text = len(text.held_out), len(text.held_out) + len(text.calibration)
    assert walks == [num, all_text, num], "one more over the held-out text: the first that is tried does"
    if not kept:
        assert said.startswith(f"--quant w8a16 {spelt(rise(model, Recipe.open('w8a16'), text))};")
    else:
        walks.clear()
        assert refused(model, harsh, text, journal) == said and not walks, "it is remembered"


def test_a_kv_cache_may_be_to_blame(model, text):
    fine = parse("{perplexity: 1, rules: [{match: '*', method: rtn, format: {dtype: int8}}]}", "fine", "fine.yaml")
    scales, found = calibrate(model, fine, text)
    both = replace(fine, kv_cache=KV_CACHES["fp8"], perplexity=found.rise + 1e-9)
    said = refused(model, both, text, Journal.none())
    assert said.startswith(f"the same without its KV cache {spelt(rise(model, fine, text, scales))};")


def test_another_kv_cache_has_scales_of_its_own(model, text):
    int8 = rise(model, kv_recipes()["int8"], text)
    said = refused(model, replace(kv_recipes()["fp8"], perplexity=int8 + 1e-9), text, Journal.none())
    assert said.startswith(f"--kv-cache int8 {spelt(int8)};")


def test_nothing_helps_or_nothing_can_be_tried(model, text):
    harsh = replace(parse(HARSH, "harsh", "harsh.yaml"), perplexity=-1.0)
    said = refused(model, harsh, text, Journal.none())
    assert said.startswith("nothing of ingot's that rounds to the nearest stays within it; fp8-static, int4-awq")
    scales, accuracy = calibrate(model, harsh, text)
    with pytest.raises(BuildError, match="pass --calibration-data to find a recipe"):
        check(accuracy, harsh, model, None, Scales(), Journal.none())
