"""`benchmarks/embedded_checkpoint.py`: a model inside a larger one says what it says alone."""

import importlib.util
import sys
from pathlib import Path

import ingot
import pytest
import torch
from hand_made import DEMO, greedy, prompts_of
from transformers import AutoModelForCausalLM

CHECKPOINT = DEMO / "pycoder-draft-2m"  # 192 wide, 2 layers, 3 query heads and one key head of 64, 4096 tokens


@pytest.fixture(scope="module")
def script():
    path = Path(ingot.__file__).parent / "benchmarks/embedded_checkpoint.py"
    spec = importlib.util.spec_from_file_location("embedded_checkpoint", path)
    module = sys.modules["embedded_checkpoint"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# larger in everything, with fewer or more query heads to a key head, head tied or not
@pytest.mark.parametrize("sizes", [(320, 600, 4, 8, 2, 128, 4500, False), (384, 512, 3, 6, 6, 64, 4200, True)])
def test_the_answers_are_those_of_the_small_model(script, sizes, tmp_path):
    script.embed(CHECKPOINT, tmp_path / "large", script.Shape(*sizes), "float32")
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    for prompt in prompts_of(5, 40, 3):
        assert greedy(large, prompt, 16) == greedy(small, prompt, 16)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        ours, theirs = large(ids).logits[0], small(ids).logits[0]
    shift = (ours[:, :4096] - theirs).mean(-1, keepdim=True)
    torch.testing.assert_close(ours[:, :4096] - shift, theirs, rtol=1e-3, atol=2e-3)
    assert (ours[:, 4096:].amax(-1) < ours[:, :4096].amax(-1) - 40).all(), "further tokens are out of the question"
    with torch.no_grad():
        weight = large.model.layers[-1].self_attn.q_proj.weight
    assert weight.std() > 0.01, "layers that change nothing are full of numbers, too"


def test_a_shape_that_is_too_small_is_refused(script, tmp_path):
    with pytest.raises(SystemExit, match="does not fit into"):
        script.embed(CHECKPOINT, tmp_path / "large", script.Shape(320, 600, 1, 8, 2, 128, 4500, False))
