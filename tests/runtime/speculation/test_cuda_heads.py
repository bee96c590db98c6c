"""Heads on the cuda target, in Triton's interpreter: what they draft against plain torch, answers against none."""

import pytest
import torch
from heads import drafter, recorded, write_head, write_medusa
from ingot import LLM, SamplingParams

pytest.importorskip("triton")

from interpreted_gpu import cast, cast_head, interpreted_gpu, random_weights, write_target
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


def answers(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, progress=False)]


@pytest.mark.parametrize("kind, room", [("eagle3", ROOMY), ("eagle", TIGHT), ("medusa", ROOMY)])
def test_drafts_are_those_of_plain_torch(target, wanted, tmp_path, kind, room):
    """In company and alone, with prefix hits, and in a pool so small that a request is thrown out."""
    checkpoint, engine = target
    if kind == "medusa":
        write_medusa(tmp_path / "head", checkpoint, num=2, blocks=1, style="pt")
    else:
        write_head(tmp_path / "head", checkpoint, kind, draft_vocab=50 if kind == "eagle3" else 0)
    head = cast_head(tmp_path / "engine", tmp_path / "head", checkpoint)
    full = [prompt + answer for prompt, answer in zip(PROMPTS, wanted, strict=True)]

    def now_and_then_right(tokens, guesses):
        """Random weights never are."""
        truth = next(text for text in full if text[: len(tokens)] == tokens)[len(tokens) :]
        return [*truth[: len(seen) % 3], *guesses][: len(guesses)]

    options = dict(draft_engine=head, num_draft_tokens=3, adapt_drafts=False)
    with interpreted_gpu(), LLM(engine, speculate="medusa" if kind == "medusa" else "eagle", **options, **room) as llm:
        seen = recorded(llm, now_and_then_right)
        assert answers(llm) == wanted
        (again,) = llm.generate([PROMPTS[0] + wanted[0][:3]], GREEDY[3], progress=False)
        metrics = llm.metrics()
    assert metrics.preemptions > 0 if room is TIGHT else metrics.prefix_hits > 0
    assert again.outputs[0].token_ids == wanted[0][3:7] and metrics.speculation.accepted > 9
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    draft = drafter(kind, tmp_path / "head", model, READS[kind])
    assert len(seen) > 9 and all(found == draft(tokens, len(found)) for tokens, found in seen)
