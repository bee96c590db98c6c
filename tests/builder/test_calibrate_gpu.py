"""Calibration on a GPU against the same on the CPU, for every recipe. In fp32 what is found is the same but for the
order of sums, which moves a few numbers to their neighbours, and a search among near equals to the next candidate.

Tolerances are twice and more of what 1e-6 of noise in every product did to these recipes on the CPU: 2% of the KL
divergence, 2% of a layer's error, 0.0014 of the perplexity's rise; of scales, the next candidates of a search.
"""

import pytest
import torch
from calibrated import MANY, RECIPES, calibrated, tensors
from families import VOCAB
from hand_made import DEMO
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.builder.calibration_text import Text
from ingot.calibration.accuracy import Accuracy
from ingot.engines.manifest import Manifest
from random_graph import random_graph, random_windows

pytestmark = pytest.mark.gpu
TEXT = Text(tuple(random_windows(4, 32, VOCAB, i) for i in range(8)), (random_windows(16, 32, VOCAB, 90),))
# how far a number may be from the CPU's: a step of a search is 0.05 of a clip or an exponent, 2^(1/16) of a range
FAR = {"smoothing": 0.3, "clipping": 0.3, "activations": 0.06, "scale": 0.4}
NEIGHBOURS = 0.3  # share of GPTQ's numbers that may be others, each of which moves those after it


@pytest.fixture(autouse=True, scope="module")
def workspace():
    """What cuBLAS takes with a process's first product, and keeps."""
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")


def close(found, expected, layers=0.1, kl=0.15, rise=0.015):
    """Figures of the gate."""
    ours, theirs = (Accuracy.of(each["accuracy"]) for each in (found, expected))
    print(f"{ours.table()}\n{theirs.table()}")
    assert ours.num_tokens == theirs.num_tokens > 0 and ours.kl == pytest.approx(theirs.kl, rel=kl)
    assert ours.perplexity_before == pytest.approx(theirs.perplexity_before, rel=1e-3 if layers <= 0.1 else 1e-2)
    assert ours.rise == pytest.approx(theirs.rise, abs=rise) and ours.top1 == pytest.approx(theirs.top1, abs=0.08)
    assert {layer.name for layer in ours.layers} == {layer.name for layer in theirs.layers}
    errors = {layer.name: layer.error for layer in theirs.layers}
    for layer in ours.layers:
        assert layer.error == pytest.approx(errors[layer.name], rel=layers), layer.name


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_what_is_found(name):
    expected, before = calibrated(RECIPES[name], "cpu", text=TEXT), torch.cuda.memory_allocated()
    found = calibrated(RECIPES[name], "cuda", text=TEXT)
    assert torch.cuda.memory_allocated() == before, "nothing stays on the device"
    close(found.about, expected.about)
    assert found.about.get("mixed") == expected.about.get("mixed")
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for (kind, name), y in theirs.items():
        x = ours[kind, name]
        assert x.device.type == "cpu" and x.dtype == y.dtype and x.shape == y.shape
        if kind in FAR:
            torch.testing.assert_close(x, y, rtol=FAR[kind], atol=1e-6)
        elif kind == "kv":  # offsets are means, some around 0
            torch.testing.assert_close(x, y, rtol=0.06, atol=0.05 * float(y.abs().max()) * ("offset" in name))
        else:
            assert (x.float() != y.float()).float().mean() < NEIGHBOURS


def test_in_bf16():
    """The figures only: rounding moves scales, and tokens."""
    graph = random_graph("llama", torch.bfloat16)
    expected = calibrated(RECIPES["many"], "cpu", text=TEXT, graph=graph.clone())
    close(calibrated(RECIPES["many"], "cuda", text=TEXT, graph=graph).about, expected.about, 0.25, 0.25, 0.03)


def test_an_engine(tmp_path):
    (tmp_path / "many.yaml").write_text(MANY)
    files = sorted((DEMO.parents[1] / "runtime").glob("*.py"))
    (tmp_path / "text.txt").write_text("\n".join(path.read_text() for path in files)[:24_000])
    for device in ("cpu", "cuda"):
        build_engine(BuildConfig(
            str(DEMO / "pycoder-draft-2m"), str(tmp_path / device), dtype="float32", quant=str(tmp_path / "many.yaml"),
            calibration_data=str(tmp_path / "text.txt"), calibration_width=64, calibration_tokens=2048,
            calibration_device=device,
        ))  # fmt: skip
    expected, found = (Manifest.open(tmp_path / device).quantisation for device in ("cpu", "cuda"))
    close(found, expected)
    with LLM(tmp_path / "cuda") as llm:
        (answer,) = llm.generate("import os", SamplingParams(max_tokens=8, temperature=0.0), progress=False)
    assert len(answer.outputs[0].token_ids) == 8
