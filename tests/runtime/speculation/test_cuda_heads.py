"""Heads on the cuda target, in Triton's interpreter: what they draft against plain torch, answers against none."""

import itertools
import re

import pytest
import torch
from fitted_heads import drafter, often_right, recorded
from heads import write_head, write_medusa
from ingot import LLM, SamplingParams

pytest.importorskip("triton")

from ingot.engines.errors import EngineError
from ingot.engines.plan import FIRST, NEXT
from interpreted_gpu import (
    IdleGraphs,
    cast,
    cast_head,
    export_head,
    interpreted_gpu,
    random_weights,
    write_target,
)
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]
PROMPTS = [[5, 6, 7, 5, 6, 7], [20, 21, 20], [30] * 6, [9]]
GREEDY = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (10, 8, 9, 4)]
ROOMY, TIGHT = {"num_kv_pages": 60}, {"num_kv_pages": 7, "max_num_batched_tokens": 7}
READS = {"eagle": (1,), "eagle3": (1, 0, 0), "medusa": (1,)}  # of a model of one layer


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The checkpoint of a small model, and its engine."""
    folder, weights = tmp_path_factory.mktemp("target"), random_weights()
    return write_target(folder / "checkpoint", weights), cast(folder / "engine", weights, "cuda", (0, 1))


@pytest.fixture(scope="module")
def wanted(target):
    with interpreted_gpu(), LLM(target[1], **ROOMY) as llm:
        return answers(llm)


@pytest.fixture(scope="module")
def exported(target, tmp_path_factory):
    """The checkpoint of a head of the kind, the head, and its graph."""
    found, folder = {}, tmp_path_factory.mktemp("heads")

    def call(kind):
        if kind not in found:
            if kind == "medusa":
                write_medusa(folder / kind, target[0], num=2, blocks=1, style="pt")
            else:
                write_head(folder / kind, target[0], kind, draft_vocab=50 if kind == "eagle3" else 0)
            found[kind] = folder / kind, *export_head(folder / kind, target[0])
        return found[kind]

    return call


def answers(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, progress=False)]


def falter(drafting):
    """Of three steps behind which to guess, one is passed by, as where a prompt is scored: it lags behind."""
    launch, steps = drafting.launch, itertools.count()

    def now_and_then(batch):
        if not batch.ahead or next(steps) % 3 != 1:
            return launch(batch)
        drafting.follow(batch)
        return None

    drafting.launch = now_and_then


@pytest.mark.parametrize("kind, room", [("eagle3", ROOMY), ("eagle", TIGHT), ("medusa", ROOMY)])
def test_drafts_are_those_of_plain_torch(target, wanted, exported, tmp_path, kind, room):
    """In company and alone, with prefix hits, and in a pool so small that a request is thrown out."""
    checkpoint, engine = target
    given, *head = exported(kind)
    head = cast_head(tmp_path / "engine", *head)
    options = dict(draft_engine=head, num_draft_tokens=3, adapt_drafts=False)
    speculate = "medusa" if kind == "medusa" else "eagle"
    with interpreted_gpu() as replays, LLM(engine, speculate=speculate, **options, **room) as llm:
        replays.clear()
        seen = recorded(llm, often_right(PROMPTS, wanted))  # random weights never are
        falter(llm._session.executor._drafting)
        assert answers(llm) == wanted
        (again,) = llm.generate([PROMPTS[0] + wanted[0][:3]], GREEDY[3], progress=False)
        # what a head makes at the end of a page depends on the token behind it
        llm.generate([[*PROMPTS[0][:4], 9, 8]], GREEDY[3], progress=False)
        metrics = llm.metrics()
    assert metrics.preemptions > 0 if room is TIGHT else metrics.prefix_hits > 0
    assert again.outputs[0].token_ids == wanted[0][3:7] and metrics.speculation.accepted > 7
    # each step of the target keeps what the head reads, and steps of the head follow it
    keeps = ["keep.hidden_states.1"] if kind != "eagle3" else ["keep.hidden_states.0", "keep.hidden_states.1"]
    logits, letters = ("head", "sample.greedy"), {}
    letters[("stage", "body", *keeps, *logits)] = letters[("stage", "body", *keeps)] = "t"
    letters |= {logits: "h", ("stage", "body"): "c", (FIRST, "body", *logits): "f", (NEXT, "body", *logits): "n"}
    sequence = "".join(letters[parts] for _, parts in replays)  # "h": where there are more logits than rows for them
    assert re.fullmatch("(th*(c*fn{0,2})?)+" if kind != "medusa" else "(th*f?)+", sequence) and "f" in sequence
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    draft = drafter(kind, given, model, READS[kind])
    assert len(seen) > 9 and all(found == draft(tokens, len(found)) for tokens, found in seen)


@pytest.mark.parametrize(
    "kind, rows, tokens, drafts, nodes", [("eagle3", 9, 64, 7, 0), ("medusa", 5, 40, 16, 0), ("eagle", 9, 64, 5, 31)]
)
def test_every_step_has_a_bucket(exported, kind, rows, tokens, drafts, nodes, tmp_path):
    """Requests of all lengths, scored prompts, steps in which some draft and others do not; tokens are random."""
    sizes = dict(max_num_seqs=rows, max_num_batched_tokens=tokens, max_draft_tokens=nodes or drafts)
    engine = cast(tmp_path / "engine", random_weights(), "cuda", (0, 1), **sizes)
    head = cast_head(tmp_path / "head", *exported(kind)[1:], **sizes)
    prompts = [[5, 6, 7 + i % 3] * (1 + 5 * i % 17) for i in range(12)]
    params = [SamplingParams(temperature=i % 2, max_tokens=3 * i + 2, ignore_eos=True, seed=i, speculate=i % 5 != 0,
                             prompt_logprobs=1 if i % 4 == 0 else None, logprobs=2 if i % 3 == 0 else None)
              for i in range(12)]  # fmt: skip
    speculate = "medusa" if kind == "medusa" else "eagle"
    options = dict(draft_engine=head, num_draft_tokens=drafts, num_draft_nodes=nodes, adapt_drafts=False,
                   num_kv_pages=200, max_num_seqs=5)  # fmt: skip
    with interpreted_gpu(IdleGraphs), LLM(engine, speculate=speculate, **options) as llm:
        outputs = llm.generate(prompts, params, progress=False)
        stats = llm.metrics().speculation
    assert [len(output.outputs[0].token_ids) for output in outputs] == [each.max_tokens for each in params]
    assert stats.drafted > 50


def test_what_cannot_work_is_refused(target, exported, tmp_path):
    engine, weights = target[1], random_weights()
    head = cast_head(tmp_path / "head", *exported("medusa")[1:], max_draft_tokens=2)
    plain, few = cast(tmp_path / "plain", weights, "cuda"), cast(tmp_path / "few", weights, "cuda", (0,))
    with interpreted_gpu():
        for model, options, words in (
            (engine, dict(num_draft_tokens=3), "--max-draft-tokens 2, so it cannot draft 3 tokens; .*-tokens 3"),
            (plain, dict(num_draft_tokens=2), "reads the hidden states 1, but .* gives none; .*--hidden-states 1"),
            (few, dict(num_draft_tokens=2), "reads the hidden states 1, but .* gives 0; .*--hidden-states 1"),
            (
                engine,
                dict(speculate="eagle", num_draft_tokens=2),
                "is a head of kind medusa; use speculate=medusa with it",
            ),
            (engine, dict(num_draft_tokens=2, num_kv_pages=10**6), "1000000 KV pages need .* GiB: .*; ask for fewer"),
        ):
            with pytest.raises(EngineError, match=words):
                LLM(model, **ROOMY | dict(speculate="medusa", draft_engine=head) | options)


def test_states_have_their_share_of_the_memory(target, exported, tmp_path):
    """Bytes of a token: keys and values of both engines, and 32 fp32 numbers of each state that the head reads."""
    for kind, num_bytes in (("eagle3", 128 + 128 + 2 * 128), ("medusa", 128 + 128)):
        head = cast_head(tmp_path / kind, *exported(kind)[1:], max_num_seqs=1)
        options = dict(draft_engine=head, num_draft_tokens=2, kv_cache_memory=1 << 20, max_num_seqs=1)
        speculate = "medusa" if kind == "medusa" else "eagle"
        with interpreted_gpu(IdleGraphs), LLM(target[1], speculate=speculate, **options) as llm:
            executor = llm._session.executor
            assert executor.num_pages == (1 << 20) // (4 * num_bytes)
            pools = [name for name in executor._buffers if name.startswith("hidden_states.")]
            driver = executor._gpu._cuda
            assert len(pools) == len(set(READS[kind]))
            assert {driver.memory[executor._buffers[name]].nbytes for name in pools} == {executor.num_pages * 4 * 128}
