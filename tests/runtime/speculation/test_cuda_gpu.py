"""Drafts on a GPU: answers with every drafter are those without, for whatever a request may ask for."""

from dataclasses import replace

import pytest
from answers import PARAMS, PROMPTS, half_right, told
from cuda_engines import ROOMY, TIGHT, built
from hand_made import DEMO
from ingot import LLM, SamplingParams

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engine(shared):
    return built(shared, "target", lambda: DEMO / "pycoder-draft-2m")


@pytest.fixture(scope="module")
def draft(shared, tmp_path_factory):
    return built(shared, "draft", lambda: half_right(tmp_path_factory.mktemp("checkpoints") / "draft"))


@pytest.fixture(scope="module")
def wanted(engine):
    with LLM(engine, **ROOMY) as llm:
        return told(llm)


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("speculate", ["ngram", "suffix", "draft", "tree"])
def test_answers_are_those_without_drafts(engine, draft, wanted, speculate, room):
    options = {"draft_engine": draft} if speculate in ("draft", "tree") else {}
    options |= {"num_draft_tokens": 2, "num_draft_nodes": 3} if speculate == "tree" else {"num_draft_tokens": 3}
    speculate = "draft" if speculate == "tree" else speculate
    with LLM(engine, speculate=speculate, adapt_drafts=False, **options, **room) as llm:
        found, logprobs = told(llm)
        metrics = llm.metrics()
    assert found == wanted[0]
    for one, two in zip(logprobs, wanted[1], strict=True):
        assert (one or {}).keys() == (two or {}).keys() and all(abs(one[t] - two[t]) < 1e-3 for t in one or ())
    assert metrics.speculation.accepted > 10 and metrics.kv_utilisation == 0 and metrics.prefix_hits > 0
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
            assert told(llm)[0] == wanted[0], options


def test_answers_alone_are_those_in_a_batch(engine, draft, wanted):
    once = [replace(params, n=1) for params in PARAMS]
    options = dict(speculate="draft", draft_engine=draft, adapt_drafts=False, num_draft_tokens=3)
    with LLM(engine, **options, **ROOMY) as llm:
        together = llm.generate(PROMPTS, once, progress=False)
        for prompt, params, output in zip(PROMPTS, once, together, strict=True):
            (alone,) = llm.generate([prompt], params, progress=False)
            assert alone.outputs[0].token_ids == output.outputs[0].token_ids
