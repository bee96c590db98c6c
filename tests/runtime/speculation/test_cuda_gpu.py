"""Drafts on a GPU: answers with every drafter are those without, for whatever a request may ask for."""

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from answers import PARAMS, PROMPTS
from hand_made import DEMO
from ingot import LLM, SamplingParams, build_engine
from ingot.builder import BuildConfig
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.gpu
# few buckets: they are compiled while all other tests run
SIZES = dict(target="cuda", dtype="float32", max_num_seqs=4, max_num_batched_tokens=16, page_size=4, tune=False,
             max_draft_tokens=3)  # fmt: skip
ROOMY = {"num_kv_pages": 400}
TIGHT = {"num_kv_pages": 32}  # requests are thrown out


def built(shared: Path, name: str, checkpoint) -> Path:
    """The engine of what `checkpoint` gives a folder for; made once, by whichever of pytest's workers comes first."""
    out = shared / f"speculation-{name}"
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            build_engine(BuildConfig(str(checkpoint()), str(out), **SIZES))
    return out


@pytest.fixture(scope="module")
def engine(shared):
    return built(shared, "target", lambda: DEMO / "pycoder-draft-2m")


@pytest.fixture(scope="module")
def draft(shared, tmp_path_factory):
    """A draft engine that is right often, though not always: the small model with its last layer's MLP left out."""

    def checkpoint():
        folder = tmp_path_factory.mktemp("checkpoints") / "draft"
        shutil.copytree(DEMO / "pycoder-draft-2m", folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros_like(
            weights["model.layers.1.mlp.down_proj.weight"]
        )
        save_file(weights, folder / "model.safetensors")
        return folder

    return built(shared, "draft", checkpoint)


def answers(llm):
    """Everything that a user sees but times, of a batch of all kinds; twice, so that prefixes are found."""
    found, logprobs = [], []
    for _ in range(2):
        for output in llm.generate(PROMPTS, PARAMS, progress=False):
            for answer in output.outputs:
                found.append((answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason))
                logprobs += [{t: p.logprob for t, p in entry.items()} for entry in answer.logprobs or ()]
            logprobs += [e and {t: p.logprob for t, p in e.items()} for e in output.prompt_logprobs or ()]
    return found, logprobs


@pytest.fixture(scope="module")
def wanted(engine):
    with LLM(engine, **ROOMY) as llm:
        return answers(llm)


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("speculate", ["ngram", "suffix", "draft"])
def test_answers_are_those_without_drafts(engine, draft, wanted, speculate, room):
    options = {"draft_engine": draft} if speculate == "draft" else {}
    with LLM(engine, speculate=speculate, adapt_drafts=False, num_draft_tokens=3, **options, **room) as llm:
        found, logprobs = answers(llm)
        metrics = llm.metrics()
    assert found == wanted[0]
    for one, two in zip(logprobs, wanted[1], strict=True):
        assert (one or {}).keys() == (two or {}).keys() and all(abs(one[t] - two[t]) < 1e-3 for t in one or ())
    assert metrics.speculation.accepted > 20 and metrics.kv_utilisation == 0 and metrics.prefix_hits > 0
    assert (metrics.preemptions > 0) == (room is TIGHT)


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_an_engine_that_drafts_for_itself_is_nearly_always_right(engine, room):
    """Whatever it lags behind, is thrown out or finds in the prefix cache; but for ties, which other shapes decide."""
    greedy = [SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, speculate=i != 2) for i in range(7)]
    options = dict(speculate="draft", draft_engine=engine, adapt_drafts=False, num_draft_tokens=3)
    with LLM(engine, **options, **room) as llm:
        llm.generate(PROMPTS[3:], SamplingParams(temperature=0, max_tokens=9, speculate=False), progress=False)
        for _ in range(2):
            llm.generate(PROMPTS, greedy, progress=False)
        stats = llm.metrics().speculation
    assert stats.drafted > 200 and stats.accepted >= 0.99 * stats.drafted


def test_adaptation_and_other_numbers_of_drafts_change_no_answer(engine, draft, wanted):
    for options in ({"num_draft_tokens": 3}, {"num_draft_tokens": 1, "adapt_drafts": False}):
        with LLM(engine, speculate="draft", draft_engine=draft, **options, **ROOMY) as llm:
            assert answers(llm)[0] == wanted[0], options


def test_answers_alone_are_those_in_a_batch(engine, draft, wanted):
    once = [replace(params, n=1) for params in PARAMS]
    options = dict(speculate="draft", draft_engine=draft, adapt_drafts=False, num_draft_tokens=3)
    with LLM(engine, **options, **ROOMY) as llm:
        together = llm.generate(PROMPTS, once, progress=False)
        for prompt, params, output in zip(PROMPTS, once, together, strict=True):
            (alone,) = llm.generate([prompt], params, progress=False)
            assert alone.outputs[0].token_ids == output.outputs[0].token_ids
