"""Heads on the cuda target, in Triton's interpreter: what they draft against plain torch, answers against none."""

import json

import pytest
import torch
from heads import drafts, medusa_drafts, write_head, write_medusa
from ingot import LLM, SamplingParams

pytest.importorskip("triton")

from ingot.runtime.speculation.verify import holding
from interpreted_gpu import cast, cast_head, interpreted_gpu, random_weights, write_target
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]
PROMPTS = [[5, 6, 7, 5, 6, 7], [20, 21, 20], [30] * 6, [9]]
GREEDY = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (10, 8, 9, 4)]
ROOMY, TIGHT = {"num_kv_pages": 60}, {"num_kv_pages": 7, "max_num_batched_tokens": 7}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The checkpoint of a small model, and its engine."""
    folder = tmp_path_factory.mktemp("target")
    weights = random_weights()
    return write_target(folder / "checkpoint", weights), cast(folder / "engine", weights, "cuda", (0, 1))


@pytest.fixture(scope="module")
def wanted(target):
    with interpreted_gpu(), LLM(target[1], **ROOMY) as llm:
        return answers(llm)


def answers(llm, params=GREEDY):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, progress=False)]


def recorded(llm, wanted):
    """Fills with (tokens of a request, guesses of what follows) as it drafts. What is handed on is now and then right:
    heads of random weights never are."""
    full = [prompt + answer for prompt, answer in zip(PROMPTS, wanted, strict=True)]
    drafting, seen = llm._session.executor._drafting, []
    settle = drafting.settle

    def record(batch, tokens, guesses):
        found = settle(batch, tokens, guesses)
        for known, work in zip(batch.ahead.known, guesses.works, strict=True) if guesses else ():
            mine = batch.sample_works == work
            of_it = tokens[mine]
            if batch.drafts is not None:
                of_it = of_it[holding(of_it, batch.drafts[mine])]
            tokens_of_it = [*known, *of_it.tolist()]
            seen.append((tokens_of_it, found[work]))
            if len(seen) % 3:
                num, truth = len(found[work]), next(f for f in full if f[: len(tokens_of_it)] == tokens_of_it)
                found[work] = (truth[len(tokens_of_it) :] + found[work])[: max(1, num - len(seen) % 2)]
        return found

    drafting.settle = record
    return seen


@pytest.mark.parametrize("kind, room", [("eagle3", ROOMY), ("eagle", TIGHT), ("medusa", ROOMY)])
def test_drafts_are_those_of_plain_torch(target, wanted, tmp_path, kind, room):
    """In company and alone, with prefix hits, and in a pool so small that a request is thrown out."""
    checkpoint, engine = target
    if kind == "medusa":
        tensors = write_medusa(tmp_path / "head", checkpoint, num=2, blocks=1, style="pt")
    else:
        write_head(tmp_path / "head", checkpoint, kind, draft_vocab=50 if kind == "eagle3" else 0)
        tensors = load_file(tmp_path / "head/model.safetensors")
    head = cast_head(tmp_path / "engine", tmp_path / "head", checkpoint)
    speculate = "medusa" if kind == "medusa" else "eagle"
    options = dict(draft_engine=head, num_draft_tokens=3, adapt_drafts=False)
    with interpreted_gpu(), LLM(engine, speculate=speculate, **options, **room) as llm:
        seen = recorded(llm, wanted)
        assert answers(llm) == wanted
        (again,) = llm.generate([PROMPTS[0] + wanted[0][:3]], GREEDY[1], progress=False)
        metrics = llm.metrics()
    assert metrics.preemptions > 0 if room is TIGHT else metrics.prefix_hits > 0
    assert again.outputs[0].token_ids[:7] == wanted[0][3:] and metrics.speculation.accepted > 10
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config, embedding = json.loads((tmp_path / "head/config.json").read_text()), model.get_input_embeddings().weight
    with torch.inference_mode():
        for tokens, found in seen:
            states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
            if kind == "medusa":
                assert found == medusa_drafts(tensors, states[1][0, -1], 2, 1)[: len(found)]
                continue
            features = torch.cat([states[i][0] for i in ((1, 0, 0) if kind == "eagle3" else (1,))], -1)
            assert found == drafts(tensors, config, features, tokens, len(found), embedding)
    assert len(seen) > 10
