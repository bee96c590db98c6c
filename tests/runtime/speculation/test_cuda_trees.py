"""Trees of drafts on the cuda target, in Triton's interpreter: drafts against plain torch, answers against none."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from fitted_heads import often_in_trees, recorded
from heads import logprobs_after, medusa_logits, write_head, write_medusa
from ingot import LLM, SamplingParams

pytest.importorskip("triton")

from ingot.engines.errors import EngineError
from ingot.engines.manifest import Manifest
from ingot.engines.plan import FOLDER, MOVES, Plan
from ingot.runtime.cuda.drafting import BRANCHES
from ingot.runtime.speculation.tree import Tree
from interpreted_gpu import cast, cast_head, export_head, interpreted_gpu, random_weights, write_target
from random_tree import grown, same_tree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]
PROMPTS = [[5, 6, 7, 5, 6, 7], [20, 21, 20], [30] * 6]
GREEDY = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 9, 10)]
ROOMY, TIGHT = {"num_kv_pages": 60}, {"num_kv_pages": 9, "max_num_batched_tokens": 12}
DEPTH, NODES, RUN = 3, 7, 3


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The checkpoint of a small model, its engine, and what it answers."""
    folder, weights = tmp_path_factory.mktemp("target"), random_weights()
    engine = cast(folder / "engine", weights, "cuda", (0, 1), max_draft_tokens=NODES)
    with interpreted_gpu(), LLM(engine, **ROOMY) as llm:
        return write_target(folder / "checkpoint", weights), engine, answers(llm)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """A checkpoint that is right now and then, and its engine."""
    folder, weights = tmp_path_factory.mktemp("draft"), random_weights()
    weights["model.layers.0.mlp.down_proj.weight"] *= 0.3
    return write_target(folder / "checkpoint", weights), cast(
        folder / "engine", weights, "cuda", max_draft_tokens=NODES
    )


def answers(llm, params=GREEDY):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, progress=False)]


def growing(engine, drafter, speculate="draft", room=ROOMY):
    options = dict(num_draft_tokens=DEPTH, num_draft_nodes=NODES, adapt_drafts=False)
    return LLM(engine, speculate=speculate, draft_engine=drafter, **options, **room)


def now_and_then_chains(llm, instead):
    """For `recorded`: as `instead`; whether the next drafts are to be trees changes from step to step."""
    speculation, turn = llm._session.scheduler._speculation, itertools.count()

    def call(tokens, guesses):
        speculation._tree = next(turn) % 5 > 1
        return instead(tokens, guesses)

    return call


def enough(seen):
    """The same, chains behind trees and trees behind chains."""
    num_trees = sum(isinstance(found, Tree) for _, found in seen)
    assert num_trees > 4 and sum(bool(found) for _, found in seen) > num_trees + 2
    return seen


def likeliest(found, after, run=RUN):
    """Whether a tree or chain is the one that grows by `after(path)`, log-probabilities of what follows."""
    if isinstance(found, Tree):
        return same_tree(found, grown(after, DEPTH, NODES, run))
    return found == [int(after(found[:i]).argmax()) for i in range(len(found))]


@pytest.mark.parametrize("room", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_a_draft_engine_grows_the_trees_of_plain_torch(target, draft, room):
    """In company, with prefix hits, and in a pool so small that a request is thrown out."""
    _, engine, wanted = target
    with interpreted_gpu() as replays, growing(engine, draft[1], room=room) as llm:
        seen = recorded(llm, now_and_then_chains(llm, often_in_trees(PROMPTS, wanted)))
        assert answers(llm) == wanted
        (again,) = llm.generate([PROMPTS[0] + wanted[0][:5]], GREEDY[1], progress=False)
        metrics, moved = llm.metrics(), sum(MOVES in parts for _, parts in replays)
    assert again.outputs[0].token_ids[:7] == wanted[0][5:]
    assert metrics.preemptions > 0 if room is TIGHT else metrics.prefix_hits > 0
    assert moved > 2 and metrics.speculation.accepted_at[1] > 0
    model = AutoModelForCausalLM.from_pretrained(draft[0], dtype=torch.float32)
    with torch.inference_mode():
        for tokens, found in enough(seen):
            assert likeliest(
                found, lambda path, t=tokens: model(torch.tensor([t + path])).logits[0, -1].log_softmax(-1)
            )


def test_what_is_sampled_is_what_it_would_be_without_drafts(target, draft):
    """With penalties, which count the drafts before a sample, and in company of a request that wants no drafts."""
    params = [SamplingParams(temperature=0.9, max_tokens=9, seed=seed, ignore_eos=True, frequency_penalty=0.4 * seed,
                             repetition_penalty=1.2, speculate=seed != 2) for seed in range(3)]  # fmt: skip
    with interpreted_gpu(), LLM(target[1], **ROOMY) as llm:
        wanted = answers(llm, params)
    with interpreted_gpu(), growing(target[1], draft[1]) as llm:
        assert answers(llm, params) == wanted
        assert 2 < llm.metrics().speculation.accepted


@pytest.mark.parametrize("kind", ["eagle3", "eagle", "medusa"])
def test_heads_grow_the_trees_of_plain_torch(target, tmp_path, kind):
    """Random heads are hardly ever right, so the truth is put into their trees, beside the likeliest path or on it."""
    checkpoint, engine, wanted = target
    if kind == "medusa":
        tensors = write_medusa(tmp_path / "head", checkpoint, num=DEPTH, blocks=1, style="pt")
    else:
        write_head(tmp_path / "head", checkpoint, kind, draft_vocab=50 if kind == "eagle3" else 0)
        tensors = load_file(tmp_path / "head" / "model.safetensors")
    sizes = dict(max_draft_tokens=NODES)
    head = cast_head(tmp_path / "engine", *export_head(tmp_path / "head", checkpoint), **sizes)
    with interpreted_gpu() as replays, growing(engine, head, "medusa" if kind == "medusa" else "eagle") as llm:
        seen = recorded(llm, now_and_then_chains(llm, often_in_trees(PROMPTS, wanted)))
        assert answers(llm) == wanted
        stats, moved = llm.metrics().speculation, sum(MOVES in parts for _, parts in replays)
    assert stats.accepted > 5 and moved > 2
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config, embedding = json.loads((tmp_path / "head" / "config.json").read_text()), model.get_input_embeddings().weight
    reads = (1, 0, 0) if kind == "eagle3" else (1,)
    with torch.inference_mode():
        for tokens, found in enough(seen):
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            if kind == "medusa":
                said = [x.log_softmax(-1) for x in medusa_logits(tensors, states[1][0, -1], DEPTH, 1)]
                assert likeliest(found, lambda path, said=said: said[len(path)], run=8)
                continue
            given = tensors, config, torch.cat([states[i][0] for i in reads], -1), tokens
            assert likeliest(found, lambda path, given=given: logprobs_after(*given, path, embedding))


def older(engine, out, part):
    """The engine without this part of its plan, as older versions built it."""
    shutil.copytree(engine, out)
    plan = Plan.open(out / FOLDER)
    buckets = [{name: some for name, some in bucket.parts.items() if name != part} for bucket in plan.buckets]
    kept = tuple(replace(bucket, parts=parts) for bucket, parts in zip(plan.buckets, buckets, strict=True))
    replace(plan, buckets=kept).save(out / FOLDER)
    Manifest.read(out).save(out)
    return out


def test_trees_that_cannot_be_are_refused(target, draft, tmp_path):
    few = cast(tmp_path / "few", random_weights(), "cuda", max_draft_tokens=4)
    chains = older(target[1], tmp_path / "target", MOVES), older(draft[1], tmp_path / "draft", BRANCHES)
    again = "compile it again .*retarget .* 7"
    for engine, drafter, nodes, words in (
        (target[1], draft[1], 9, "num_draft_nodes is 9, but .* verify at most 7; ask for"),
        (target[1], few, 7, f"--max-draft-tokens 4, so it cannot draft trees of 7; {again}"),
        (chains[0], draft[1], 7, f"was built by a version that verified chains only; {again}"),
        (target[1], chains[1], 7, f"was built by a version that drafted chains only; {again}"),
    ):
        options = dict(speculate="draft", draft_engine=drafter, num_draft_tokens=3, num_draft_nodes=nodes)
        with interpreted_gpu(), pytest.raises(EngineError, match=words):
            LLM(engine, **options, **ROOMY)
