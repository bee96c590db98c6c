"""Answers with drafts against answers without, through `LLM`, for every drafter; what is refused, and how."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from answers import PROMPTS, ROOMY, TIGHT, answers, half_right
from hand_made import DEMO, cast_llama
from ingot import LLM, SamplingParams
from ingot.engines.errors import EngineError
from ingot.engines.manifest import Manifest
from ingot.runtime import cpu
from ingot.runtime.capacity import ServeConfig
from ingot.runtime.executor import open_executor
from ingot.runtime.speculation.tree import Tree
from random_tree import grown, same_tree
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return cast_llama(DEMO / "pycoder-draft-2m", tmp_path_factory.mktemp("engines") / "small")


@pytest.fixture(scope="module")
def draft(engine, tmp_path_factory):
    checkpoint = half_right(tmp_path_factory.mktemp("checkpoints") / "draft")
    return cast_llama(checkpoint, tmp_path_factory.mktemp("engines") / "draft")


@pytest.fixture(scope="module")
def wanted(engine):
    with LLM(engine, **ROOMY) as llm:
        return answers(llm)


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("speculate", ["ngram", "suffix", "draft", "tree"])
def test_answers_are_those_without_drafts(engine, draft, wanted, speculate, room, monkeypatch):
    options = {"draft_engine": draft} if speculate in ("draft", "tree") else {}
    if speculate == "tree":
        speculate, options["num_draft_nodes"] = "draft", 12
    moved = []
    monkeypatch.setattr(cpu, "move", lambda pools, *slots, move=cpu.move: moved.append(slots) or move(pools, *slots))
    with LLM(engine, speculate=speculate, adapt_drafts=False, num_draft_tokens=3, **options, **room) as llm:
        assert answers(llm) == wanted
        metrics = llm.metrics()
    assert (len(moved) > 5) == ("num_draft_nodes" in options)
    stats = metrics.speculation
    assert stats.accepted > 20 and stats.drafted > stats.accepted and metrics.kv_utilisation == 0
    assert sum(stats.accepted_at) == stats.accepted and stats.accepted_at[0] >= stats.accepted_at[-1] > 0
    assert metrics.prefix_hits > 0 and 0 < stats.share <= 1
    assert (metrics.preemptions > 0) == (room is TIGHT)


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_an_engine_that_drafts_for_itself_is_always_right(engine, room):
    """Whatever it lags behind, is thrown out or finds in the prefix cache, its KV is that of the tokens."""
    greedy = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, speculate=i != 2) for i in range(7)]
    with LLM(engine, speculate="draft", draft_engine=engine, adapt_drafts=False, **room) as llm:
        llm.generate(PROMPTS[3:], SamplingParams(temperature=0, max_tokens=9, speculate=False), progress=False)
        llm.generate(PROMPTS, greedy, progress=False)
        llm.generate(PROMPTS, greedy, progress=False)
        stats, preemptions = llm.metrics().speculation, llm.metrics().preemptions
    assert stats.drafted > 200 and stats.accepted == stats.drafted
    assert (preemptions > 0) == (room is TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_slots_are_read_before_they_are_written(dtype):
    """Pages are anywhere; what moves to a slot that something else moves from, does not move on."""
    pools = {name: torch.randint(0, 99, (4, 3, 2, 5)).to(dtype) for name in "kv"}
    before = {name: pool.clone().float().flatten(0, 1) for name, pool in pools.items()}
    cpu.move(pools, np.array([7, 3, 11], np.int32), np.array([3, 10, 7], np.int32))
    for name, pool in pools.items():
        wanted = before[name].clone()
        wanted[[3, 10, 7]] = before[name][[7, 3, 11]]
        assert torch.equal(pool.float().flatten(0, 1), wanted)


def test_a_tree_from_the_engine_itself_is_always_right(engine):
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    options = dict(speculate="draft", draft_engine=engine, adapt_drafts=False, num_draft_tokens=4, num_draft_nodes=15)
    with LLM(engine, **options, **TIGHT) as llm:
        for _ in range(2):
            llm.generate(PROMPTS, greedy, progress=False)
        stats, preemptions = llm.metrics().speculation, llm.metrics().preemptions
    assert preemptions and stats.accepted_at[0] == stats.drafts > 50 and stats.mean_length > 4
    assert stats.drafted_at[0] > stats.drafts, "no trees were drafted"


def test_trees_are_those_of_plain_torch(engine, draft, tmp_path):
    """What a draft engine guesses for requests that are chunked, thrown out and found in the prefix cache."""
    model, seen = AutoModelForCausalLM.from_pretrained(half_right(tmp_path / "draft"), dtype=torch.float32), []
    options = dict(speculate="draft", draft_engine=draft, adapt_drafts=False, num_draft_tokens=3, num_draft_nodes=10)
    with LLM(engine, **options, **TIGHT) as llm:
        drafter = llm._session.executor.drafter

        def record(pages, rows, ends, *rest, guess=drafter._guess):
            guesses = guess(pages, rows, ends, *rest)
            for row, end, some in zip(pages, ends, guesses, strict=True):
                at = np.arange(end)
                seen.append((drafter._token[drafter._slots(row[at // 4], at)].tolist(), some))
            return guesses

        drafter._guess = record
        greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        outputs = [llm.generate(PROMPTS, greedy, progress=False) for _ in range(2)]
    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs[0]]
    assert all(tokens in [text[: len(tokens)] for text in texts] for tokens, _ in seen), (
        "other tokens than the target's"
    )
    trees = [(tokens, found) for tokens, found in seen if isinstance(found, Tree)]
    assert len(trees) > 50

    def after(tokens):
        return lambda path: model(torch.tensor([tokens + path])).logits[0, -1].log_softmax(-1)

    with torch.inference_mode():
        for tokens, found in trees[:: len(trees) // 30]:
            assert same_tree(found, grown(after(tokens), 3, 10, run=4))


@pytest.mark.parametrize("nodes", [0, 12])
def test_adaptation_changes_no_answer(engine, draft, wanted, nodes):
    with LLM(engine, speculate="draft", draft_engine=draft, num_draft_nodes=nodes, **ROOMY) as llm:
        assert answers(llm) == wanted


def changed(engine, out, **model):
    """The engine with another manifest."""
    shutil.copytree(engine, out)
    manifest = Manifest.open(out)
    dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **model)).save(out)
    return out


def other_tokenizer(engine, out):
    shutil.copytree(engine, out)
    path = out / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    a, b = (next(token for token, number in vocab.items() if number == n) for n in (300, 301))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(content))
    Manifest.read(out).save(out)
    return out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"speculate": "magic"}, "speculate is 'magic'; it must be one of ngram, suffix, draft, eagle, medusa"),
        ({"speculate": "draft"}, "needs a draft engine"),
        ({"speculate": "eagle"}, "needs a head's engine"),
        ({"draft_engine": "x"}, "draft_engine is for speculate=draft, eagle, medusa, which is None"),
        (
            {"speculate": "ngram", "draft_engine": "x"},
            "draft_engine is for speculate=draft, eagle, medusa, which is 'ngram'",
        ),
        ({"speculate": "draft", "draft_engine": "/nowhere"}, "/nowhere"),
        ({"speculate": "ngram", "num_draft_tokens": 0}, "num_draft_tokens is 0; it must be an integer from 1 to 16"),
        ({"speculate": "ngram", "num_draft_tokens": 17}, "num_draft_tokens is 17"),
        ({"speculate": "ngram", "num_draft_tokens": 8, "max_model_len": 8}, "a request may have 8 tokens only"),
        ({"speculate": "ngram", "prompt_lookup_min": 5}, "prompt_lookup_min is 5; it must not exceed"),
        ({"speculate": "ngram", "prompt_lookup_max": True}, "prompt_lookup_max is True"),
        ({"num_draft_nodes": 32}, "num_draft_nodes is 32; it must be an integer from 0 to 31"),
        ({"speculate": "ngram", "num_draft_nodes": 8}, "num_draft_nodes is for speculate=draft, eagle, medusa, which"),
        (
            {"speculate": "draft", "draft_engine": "x", "num_draft_nodes": 4},
            "num_draft_nodes is 4, but a chain has 4 .* already",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(engine, options, message):
    with pytest.raises(EngineError, match=message) as caught:
        LLM(engine, **options)
    assert str(caught.value).count(". ") == 0, "one sentence"


def test_draft_engines_that_do_not_fit_are_refused(engine, tmp_path):
    for draft, message in (
        (changed(engine, tmp_path / "short", max_model_len=64), "has 64 positions, but requests may have"),
        (changed(engine, tmp_path / "target", vocab_size=99), None),
        (
            other_tokenizer(engine, tmp_path / "tokens"),
            "has another tokenizer .*: token 300 is '.*' there and '.*' here",
        ),
    ):
        if message is None:
            (draft / "tokenizer.json").unlink()
            Manifest.read(draft).save(draft)
            message = "has a vocabulary of 99 tokens, .* one of 4096"
        with pytest.raises(EngineError, match=message) as caught:
            LLM(engine, speculate="draft", draft_engine=draft)
        assert "\n" not in str(caught.value)


def test_the_tensorrt_target_refuses(engine):
    from ingot.runtime.engine import Engine

    opened = Engine.open(engine)
    other = dataclasses.replace(opened, manifest=dataclasses.replace(opened.manifest, target="tensorrt"))
    with pytest.raises(EngineError, match="speculate is 'ngram', but .* tensorrt target, which cannot verify drafts;"):
        open_executor(other, ServeConfig(speculate="ngram"))


def test_the_benchmark_compares_and_draws(engine, tmp_path):
    """`ingot bench --speculate` on prompts that the model writes itself."""
    from ingot.__main__ import app
    from typer.testing import CliRunner

    plot = tmp_path / "plot.png"
    options = "--levels 1,2 --rounds 1 --input-len 8 --output-len 24 --num-draft-tokens 2 --json".split()
    found = CliRunner().invoke(app, ["bench", str(engine), "--speculate", "ngram", "--plot", str(plot), *options])
    assert found.exit_code == 0, found.output
    levels = json.loads(found.output[found.output.index("{") :])["levels"]
    assert [level["concurrency"] for level in levels] == [1, 2] and plot.stat().st_size > 1000
    for level in levels:
        assert level["plain"] > 0 and level["speedup"] == pytest.approx(level["speculating"] / level["plain"])
        assert 0 <= level["share"] <= 1
    refused = CliRunner().invoke(app, ["bench", str(engine), "--speculate", "ngram", "--rate", "3"])
    assert refused.exit_code == 2 and "--levels" in refused.output
