"""Heads that draft from hidden states: their drafts against plain torch, answers with them against answers without."""

import dataclasses
import json
import shutil

import pytest
import torch
from answers import PROMPTS, ROOMY, TIGHT, answers
from hand_made import DEMO, cast_llama
from heads import drafts, logprobs_after, medusa_logits, write_head, write_medusa
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.builder.heads.train import TrainConfig, train_head
from ingot.engines.errors import EngineError
from ingot.engines.manifest import Manifest
from ingot.runtime.speculation.tree import Tree
from random_tree import grown, same_tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TARGET = DEMO / "pycoder-draft-2m"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return cast_llama(TARGET, tmp_path_factory.mktemp("engines") / "small", hidden_states=(0, 1, 2))


@pytest.fixture(scope="module")
def wanted(engine):
    with LLM(engine, **ROOMY) as llm:
        return answers(llm)


@pytest.fixture(scope="module")
def build(tmp_path_factory, engine):
    """Builds a head for the target, without the C++ compiler, which takes longer than all else."""

    def call(checkpoint):
        out = tmp_path_factory.mktemp("heads") / "engine"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(out))
            manifest = build_engine(BuildConfig(str(checkpoint), str(out), dtype="float32", draft_for=str(engine)))
        assert manifest.build.self_check_error < 1e-4 and manifest.head is not None
        return out

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a head that was trained for a moment, on this project's own text."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.py"
    text.write_text("\n".join(path.read_text() for path in sorted((DEMO.parents[1] / "runtime").glob("*.py"))))
    losses = []
    config = TrainConfig(str(TARGET), str(text), str(folder / "head"), tokens=1 << 14, drafts=2, width=64, batch=4,
                         draft_vocab=1500, learning_rate=4e-3)  # fmt: skip
    found = train_head(config, on_step=lambda done, total, loss: losses.append(loss))
    return folder / "head", losses, found


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    """Of the head that was trained, `fc` with a bias, which no training here gives it."""
    folder = shutil.copytree(trained[0], tmp_path_factory.mktemp("biased") / "head")
    tensors = load_file(folder / "model.safetensors")
    bias = 0.1 * torch.randn(len(tensors["fc.weight"]), generator=torch.Generator().manual_seed(5))
    save_file(tensors | {"fc.bias": bias.to(tensors["fc.weight"].dtype)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def head(checkpoint, build):
    return build(checkpoint)


def test_a_head_that_is_trained_agrees_more_and_more(trained):
    checkpoint, losses, found = trained
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert found.by_step[0] > 0.1 and found.mean_length > 1.1
    config, tensors = json.loads((checkpoint / "config.json").read_text()), load_file(checkpoint / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == 1500
    ids = torch.arange(1500) + tensors["d2t"]
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids) and len(tensors["lm_head.weight"]) == 1500
    assert not (checkpoint / "training.pt").exists()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)


def drafted(engine, **options):
    """(tokens of a request so far, what was guessed to follow), with prompts in chunks, prefix hits, requests that are
    thrown out, and drafts that hold now and then."""
    seen = []
    with LLM(engine, adapt_drafts=False, num_draft_tokens=3, **options, **TIGHT) as llm:
        drafter = llm._session.executor.drafter
        guess = drafter._guess

        def record(pages, rows, ends, tokens, nums):
            drafter._put(pages, ends - 1, tokens)
            guesses = guess(pages, rows, ends, tokens, nums)
            for row, end, some in zip(pages, ends, guesses, strict=True):
                at = torch.arange(int(end)).numpy()
                seen.append((drafter._token[drafter._slots(row[at // 4], at)].tolist(), some))
            return guesses

        drafter._guess = record
        greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        llm.generate(PROMPTS, greedy, progress=False)
        llm.generate(PROMPTS, greedy, progress=False)
        assert llm.metrics().preemptions > 0 and llm.metrics().prefix_hits > 0
        num, hits = len(seen), llm.metrics().prefix_hits
        for token in (5, 6, 7):  # what a head makes at the end of a page depends on the token behind it
            llm.generate([[*PROMPTS[0][:8], token]], greedy, progress=False)
        assert llm.metrics().prefix_hits > hits + 1 and num > 100
    return seen[: num : num // 40] + seen[num:]


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_drafts_are_those_of_plain_torch(engine, build, checkpoint, head, model, tmp_path, kind):
    name = "model.safetensors"
    if kind == "eagle":  # of random weights
        checkpoint, name = write_head(tmp_path / kind, TARGET, kind, pickled=True), "pytorch_model.bin"
        head = build(checkpoint)
    tensors = torch.load(checkpoint / name) if kind == "eagle" else load_file(checkpoint / name)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    config, embedding = json.loads((checkpoint / "config.json").read_text()), model.get_input_embeddings().weight
    with torch.inference_mode():
        for tokens, found in drafted(engine, speculate="eagle", draft_engine=head):
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            features = torch.cat([states[i][0] for i in ((2, 1, 0) if kind == "eagle3" else (2,))], -1)
            assert found == drafts(tensors, config, features, tokens, len(found), embedding)


def test_trees_are_those_of_plain_torch(engine, checkpoint, head, model):
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor
               for name, tensor in load_file(checkpoint / "model.safetensors").items()}  # fmt: skip
    config, embedding = json.loads((checkpoint / "config.json").read_text()), model.get_input_embeddings().weight
    trees = 0
    with torch.inference_mode():
        for tokens, found in drafted(engine, speculate="eagle", draft_engine=head, num_draft_nodes=9):
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            rest = tensors, config, torch.cat([states[i][0] for i in (2, 1, 0)], -1), tokens
            if isinstance(found, Tree):
                trees += 1
                wanted = grown(lambda path, rest=rest: logprobs_after(*rest, path, embedding), 3, 9, run=4)
                assert same_tree(found, wanted)
                found = [node for i, node in enumerate(found) if [*found.parents[: i + 1]] == [*range(-1, i)]]
            assert found == drafts(*rest, len(found), embedding)
    assert trees > 10


def test_medusa_drafts_are_those_of_plain_torch(engine, build, model, tmp_path, wanted):
    tensors = write_medusa(tmp_path / "medusa", TARGET, num=2, blocks=2, style="pt")
    heads = build(tmp_path / "medusa")
    with torch.inference_mode():
        for tokens, found in drafted(engine, speculate="medusa", draft_engine=heads):
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            said = medusa_logits(tensors, states[2][0, -1], 2, 2)
            assert found == [int(logits.argmax()) for logits in said][: len(found)] and len(found) <= 2
        trees = drafted(engine, speculate="medusa", draft_engine=heads, num_draft_nodes=11)
        for tokens, found in trees:
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            said = [logits.log_softmax(-1) for logits in medusa_logits(tensors, states[2][0, -1], 2, 2)]
            if isinstance(found, Tree):
                assert same_tree(found, grown(lambda path, said=said: said[len(path)], 2, 11, run=8))
        assert sum(isinstance(found, Tree) for _, found in trees) > 10
    options = dict(speculate="medusa", draft_engine=heads, adapt_drafts=False, num_draft_tokens=2, num_draft_nodes=11)
    with LLM(engine, **options, **TIGHT) as llm:
        assert answers(llm) == wanted
    with pytest.raises(EngineError, match="speculate is eagle, but .* is a head of kind medusa; use speculate=medusa"):
        LLM(engine, speculate="eagle", draft_engine=heads)


@pytest.mark.parametrize("nodes", [0, 12])
@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_answers_are_those_without_drafts(engine, head, wanted, room, nodes):
    options = dict(speculate="eagle", draft_engine=head, adapt_drafts=False, num_draft_tokens=3)
    with LLM(engine, **options, num_draft_nodes=nodes, **room) as llm:
        assert answers(llm) == wanted
        metrics = llm.metrics()
    assert metrics.speculation.accepted > 10 and metrics.prefix_hits > 0 and metrics.kv_utilisation == 0
    assert (metrics.preemptions > 0) == (room is TIGHT)


def changed(folder, out, **fields):
    """The engine with another manifest."""
    shutil.copytree(folder, out)
    manifest = Manifest.open(out)
    dataclasses.replace(manifest, **fields).save(out)
    return out


def test_heads_that_do_not_fit_are_refused(engine, head, tmp_path):
    manifest, plain = Manifest.read(head), cast_llama(TARGET, tmp_path / "plain")
    wide = dataclasses.replace(manifest.head, target_hidden_size=384)
    other = dataclasses.replace(manifest.head, target_vocab_size=99)
    no_text = changed(head, tmp_path / "vocabulary", head=other)
    (no_text / "tokenizer.json").unlink()
    Manifest.read(no_text).save(no_text)
    half = dataclasses.replace(manifest.model, dtype="bfloat16")
    for target, drafter, kind, message in (
        (
            engine,
            changed(head, tmp_path / "wide", head=wide),
            "eagle",
            "hidden states of 384 columns, .* have 192; give",
        ),
        (engine, no_text, "eagle", "has a vocabulary of 99 tokens, .* one of 4096"),
        (plain, head, "eagle", "reads the hidden states 0,1,2, but .* gives none; build .* --hidden-states 0,1,2"),
        (engine, changed(head, tmp_path / "half", model=half), "eagle", "is a head in bfloat16, .* in float32"),
        (engine, head, "draft", "speculate is draft, but .* is a head of kind eagle3; use speculate=eagle with it"),
        (engine, plain, "eagle", "speculate is eagle, but .* is no head; use speculate=draft with it"),
        (head, None, None, "is the engine of a head, which says nothing by itself"),
    ):
        with pytest.raises(EngineError, match=message) as caught:
            LLM(target, speculate=kind, draft_engine=drafter)
        assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0
