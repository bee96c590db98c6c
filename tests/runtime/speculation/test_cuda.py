"""Drafts on the cuda target: without a GPU whole engines in Triton's interpreter, on one as they are served."""

import pytest
import torch
from ingot import LLM, SamplingParams
from ingot.engines.errors import EngineError

pytest.importorskip("triton")

from interpreted_gpu import VOCAB, IdleGraphs, cast, interpreted_gpu, random_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]
PROMPTS = [[5, 6, 7, 5, 6, 7], [20, 21, 20], [30] * 6]
ROOMY, TIGHT = {"num_kv_pages": 60}, {"num_kv_pages": 7, "max_num_batched_tokens": 7}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The same weights for both targets, and a draft engine for cuda that is right now and then."""
    folder = tmp_path_factory.mktemp("engines")
    weights, other = random_weights(), random_weights()
    other["model.layers.0.mlp.down_proj.weight"] *= 0.7
    return (
        cast(folder / "cpu", weights, "cpu"), cast(folder / "cuda", weights, "cuda"),
        cast(folder / "draft", other, "cuda"),
    )  # fmt: skip


def answers(llm, params):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, progress=False)]


def drafting(engine, draft, room=ROOMY):
    return LLM(engine, speculate="draft", draft_engine=draft, num_draft_tokens=3, adapt_drafts=False, **room)


def test_greedy_answers_are_the_cpu_engines(engines):
    """With a draft engine, in a pool so small that a request is thrown out."""
    cpu, cuda, draft = engines
    greedy = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 7, 8)]
    with LLM(cpu) as llm:
        wanted = answers(llm, greedy)
    with interpreted_gpu() as replays, drafting(cuda, draft, TIGHT) as llm:
        replays.clear()
        assert answers(llm, greedy) == wanted
        metrics = llm.metrics()
    assert metrics.speculation.accepted > 3 and metrics.preemptions > 0
    assert any(bucket.max_query > 1 and "stage" in parts for bucket, parts in replays), "buckets for verification"


def test_what_is_sampled_is_what_it_would_be_without_drafts(engines):
    """Penalties, masks and log-probabilities: tests/plugins/test_sample_gpu.py, and test_cuda_gpu.py on a GPU."""
    _, cuda, draft = engines
    params = [SamplingParams(temperature=2.0, max_tokens=5, seed=seed, ignore_eos=True) for seed in range(3)]
    found = []
    with interpreted_gpu():
        for make in (lambda: LLM(cuda, **ROOMY), lambda: drafting(cuda, draft)):
            with make() as llm:
                found.append(answers(llm, params))
                stats = llm.metrics().speculation
    assert found[0] == found[1] and 0 < stats.accepted < stats.drafted


def test_an_engine_that_drafts_for_itself_is_always_right(engines):
    """After steps without drafts, which it has not seen, and in company of a request that wants none."""
    _, cuda, _ = engines
    without = SamplingParams(temperature=0, max_tokens=4, speculate=False, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    with interpreted_gpu(), drafting(cuda, cuda) as llm:
        llm.generate(PROMPTS[:1], without, progress=False)
        (one,) = llm.generate([PROMPTS[0]], greedy, progress=False)
        answers(llm, [greedy, without, greedy])
        stats, hits = llm.metrics().speculation, llm.metrics().prefix_hits
    assert stats.drafted > 9 and stats.accepted == stats.drafted and hits > 0
    assert max(one.outputs[0].token_ids) < VOCAB


@pytest.mark.parametrize(
    "rows, tokens, drafts, serve",
    [(9, 64, 7, {"max_num_seqs": 5}), (1, 16, 7, {}), (5, 40, 16, {}),
     (9, 64, 31, {"num_draft_tokens": 8, "num_draft_nodes": 31}),
     (5, 40, 7, {"num_draft_tokens": 1, "num_draft_nodes": 2})],
)  # fmt: skip
def test_every_step_has_a_bucket(rows, tokens, drafts, serve, tmp_path):
    """Also those that costs are measured on; requests of all lengths, scored prompts, most that can be drafted."""
    sizes = dict(max_num_seqs=rows, max_num_batched_tokens=tokens, max_draft_tokens=drafts)
    engine = cast(tmp_path / "engine", random_weights(), "cuda", **sizes)
    prompts = [[5, 6, 7 + i % 3] * (1 + 5 * i % 17) for i in range(12)]
    params = [SamplingParams(temperature=i % 2, max_tokens=3 * i + 2, ignore_eos=True, seed=i, speculate=i % 5 != 0,
                             prompt_logprobs=1 if i % 4 == 0 else None, logprobs=2 if i % 3 == 0 else None)
              for i in range(12)]  # fmt: skip
    options = dict(draft_engine=engine, num_draft_tokens=min(drafts, 16), adapt_drafts=False, num_kv_pages=200) | serve
    with interpreted_gpu(IdleGraphs), pytest.MonkeyPatch.context() as patch:
        patch.setattr("ingot.runtime.cuda.executor.MEASURING", 10.0)
        with LLM(engine, speculate="draft", **options) as llm:
            outputs = llm.generate(prompts, params, progress=False)
            stats = llm.metrics().speculation
    assert [len(output.outputs[0].token_ids) for output in outputs] == [each.max_tokens for each in params]
    assert stats.drafted > 100 and stats.accepted > 0


def test_what_cannot_work_is_refused(engines, tmp_path):
    cpu, cuda, draft = engines
    none = cast(tmp_path / "none", random_weights(), "cuda", max_draft_tokens=0)
    with interpreted_gpu():
        for target, options, words in (
            (cuda, dict(speculate="ngram", num_draft_tokens=4), "num_draft_tokens is 4, but .* verify at most 3; ask"),
            (none, dict(speculate="suffix", num_draft_tokens=1), "was built to verify none"),
            (
                cuda,
                dict(speculate="draft", draft_engine=none, num_draft_tokens=1),
                "--max-draft-tokens 0, so it cannot",
            ),
            (cuda, dict(speculate="draft", draft_engine=cpu, num_draft_tokens=1), "is for the cpu target"),
            (
                cuda,
                dict(speculate="eagle", draft_engine=draft, num_draft_tokens=1),
                "speculate is eagle, but .* is no head; use speculate=draft with it",
            ),
        ):
            with pytest.raises(EngineError, match=words):
                LLM(target, **options, **ROOMY)
