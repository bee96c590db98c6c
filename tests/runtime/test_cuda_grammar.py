"""Structured outputs on the cuda target, in Triton's interpreter: the CPU engine's answers, bound and free together."""

import json
import re
import string

import pytest
import torch
from ingot import LLM, SamplingParams
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("triton")
pytest.importorskip("llguidance")

from interpreted_gpu import VOCAB, cast, interpreted_gpu, random_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU"),
]
DATE = "[0-9]{2}-[a-f]{2,3}"
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22]}},
          "required": ["ok", "n"], "additionalProperties": False}  # fmt: skip
PROMPTS = [[5, 6, 7, 5, 6, 7], [20, 21, 20], [30] * 6, [9], [40, 41]]


def bound(seed=None, penalty=1.0, max_tokens=24, **wanted):
    return SamplingParams(temperature=0.0 if seed is None else 1.2, seed=seed, repetition_penalty=penalty,
                          max_tokens=max_tokens, structured_outputs=wanted)  # fmt: skip


GREEDY = [bound(regex=DATE), SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), bound(json=SCHEMA),
          bound(choice=["yes", "no"]), bound(regex=DATE, penalty=1.3)]  # fmt: skip
SAMPLED = [bound(seed=i, regex=DATE) for i in range(4)] + [bound(seed=9, json=SCHEMA)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The same weights for both targets, with a tokenizer of characters."""
    folder, weights = tmp_path_factory.mktemp("engines"), random_weights()
    tokens = ["Ġ", "</s>", *string.digits, *string.ascii_letters, *'{}[]":,-.', "true", "false", '{"', '":', "1-"]
    tokens += [f"x{i}" for i in range(VOCAB - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    found = {target: cast(folder / target, weights, target) for target in ("cpu", "cuda")}
    for engine in found.values():
        tokenizer.save(str(engine / "tokenizer.json"))
    return found


def answers(llm, params):
    return [output.outputs[0] for output in llm.generate(PROMPTS, params, progress=False)]


def right(answer, params):
    wanted = params.structured_outputs
    if wanted is None:
        return len(answer.token_ids) == params.max_tokens
    if wanted.choice:
        return answer.text in wanted.choice
    if wanted.regex:
        return re.fullmatch(wanted.regex, answer.text)
    found = json.loads(answer.text)
    return set(found) == {"ok", "n"} and found["ok"] in (True, False) and found["n"] in (1, 22)


def test_answers_are_those_of_the_cpu(engines):
    with LLM(engines["cpu"]) as llm:
        wanted = answers(llm, GREEDY)
    with interpreted_gpu(), LLM(engines["cuda"], num_kv_pages=60) as llm:
        found, sampled = answers(llm, GREEDY), answers(llm, SAMPLED)
    with (
        interpreted_gpu(),
        LLM(engines["cuda"], num_kv_pages=60, speculate="ngram", num_draft_tokens=3, adapt_drafts=False) as llm,
    ):
        drafted = answers(llm, GREEDY)
        assert llm.metrics().speculation.drafted
    for each in (found, drafted):
        assert [answer.token_ids for answer in each] == [answer.token_ids for answer in wanted]
    for some, params in ((found, GREEDY), (sampled, SAMPLED)):
        for answer, how in zip(some, params, strict=True):
            assert right(answer, how), (answer.text, how.structured_outputs)
    assert len({answer.text for answer in sampled}) > 1
