"""`benchmarks/embedded_checkpoint.py`, `embedded_head.py`: what is inside a larger model says what it says alone."""

import importlib.util
import sys
from pathlib import Path

import ingot
import pytest
import torch
from hand_made import DEMO, greedy, prompts_of
from heads import write_head
from ingot.builder import BuildConfig
from ingot.builder.heads import unrolled
from ingot.builder.heads.build import HeadBuild
from ingot.builder.heads.checkpoint import load
from transformers import AutoModelForCausalLM

CHECKPOINT = DEMO / "pycoder-draft-2m"  # 192 wide, 2 layers, 3 query heads and one key head of 64, 4096 tokens


def module_of(name):
    path = Path(ingot.__file__).parent / f"benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return module_of("embedded_checkpoint")


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


def guesses(head, target, ids, num):
    """What a head drafts behind each token of a text but the first, reading its own drafts: [num, T - 1]."""
    build = HeadBuild(BuildConfig(str(head), "/nowhere", draft_for=str(target)))
    unrolled.install()
    module = build._head(build.checkpoint.config, build.features, len(build.ids), unrolled.ATTENTION, torch.float32)
    tensors = load(module, build.checkpoint, build.target)
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False, assign=True)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    unrolled.begin(module)
    found, tokens, positions = [], ids[:, 1:], torch.arange(ids.shape[1] - 1)[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        x = module.combine(torch.cat([states[i] for i in build.reads], -1)[:, :-1])
        for k in range(num):
            x = module.advance(tokens, positions + k, x)
            logits = module.logits(x)
            tokens = build.ids[logits.argmax(-1)]
            found.append(tokens[0].tolist())
    return found, logits[0], build


@pytest.mark.parametrize(("reads", "large_reads"), [(None, (5, 1, 0)), ([0, 1, 2], (0, 1, 5))])
def test_a_head_guesses_what_the_small_one_guesses(script, reads, large_reads, tmp_path):
    shape = script.Shape(512, 600, 5, 8, 4, 128, 4700, False)
    script.embed(CHECKPOINT, tmp_path / "large", shape, "float32")
    named = {"eagle_aux_hidden_state_layer_ids": reads} if reads else {}
    small = write_head(tmp_path / "head", CHECKPOINT, "eagle3", draft_vocab=500, bias=False, **named)
    out = tmp_path / "large-head"
    found = module_of("embedded_head").embed_head(small, CHECKPOINT, out, shape, "float32", draft_vocab=800)
    assert found == large_reads
    ids = torch.tensor([prompts_of(60, 60, 1)[0]])
    wanted, theirs, _ = guesses(small, CHECKPOINT, ids, 4)
    drafts, ours, build = guesses(out, tmp_path / "large", ids, 4)
    assert drafts == wanted and len({*sum(wanted, [])}) > 20
    shift = (ours[:, :500] - theirs).mean(-1, keepdim=True)
    torch.testing.assert_close(ours[:, :500] - shift, theirs, rtol=1e-4, atol=1e-4)
    assert (ours[:, 500:].amax(-1) < ours[:, :500].amax(-1) - 40).all(), "further tokens are out of the question"
    assert build.reads == large_reads and len(build.ids) == 800 and int(build.ids[500]) == 4096
    assert build.checkpoint.tensors["midlayer.self_attn.q_proj.weight"].shape == (8 * 128, 2 * 512)


def test_a_head_of_another_target_is_refused(script, tmp_path):
    head = write_head(tmp_path / "head", CHECKPOINT, "eagle3", bias=False)
    with pytest.raises(SystemExit, match="has hidden_size 192, .* has 384: give the target of the head"):
        module_of("embedded_head").embed_head(head, DEMO / "pycoder-14m", tmp_path / "out", script.SHAPES["llama-68m"])
    head = write_head(tmp_path / "eagle", CHECKPOINT, "eagle")
    with pytest.raises(SystemExit, match="is no EAGLE-3 head as `ingot train-head` writes it"):
        module_of("embedded_head").embed_head(head, CHECKPOINT, tmp_path / "out", script.SHAPES["llama-68m"])
