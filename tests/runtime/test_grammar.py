"""Structured outputs: every answer is what was asked for, and nobody else's answer changes."""

import json
import re

import numpy as np
import pytest
from ingot import LLM, RequestError, SamplingParams
from ingot.runtime.grammar import Grammars, StructuredOutputs
from ingot.runtime.speculation.tree import Tree

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12},
                   "age": {"type": "integer", "minimum": 0, "maximum": 150},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}  # fmt: skip
PROMPT = "person = json.loads('''"
GREEDY = dict(temperature=0, max_tokens=120)
HOT = dict(temperature=1.5, seed=5, max_tokens=120)


@pytest.fixture(scope="module")
def llm(demo_engine):
    with LLM(demo_engine) as llm:
        yield llm


def answers(llm, prompt=PROMPT, **options):
    return llm.generate(prompt, SamplingParams(**options), progress=False)[0].outputs


@pytest.mark.parametrize("options", [GREEDY, HOT], ids=["greedy", "hot"])
@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)], ids=["object", "text"])
def test_json_is_of_the_schema(llm, options, schema):
    for answer in answers(llm, **options, n=3, structured_outputs={"json": schema}):
        assert answer.finish_reason == "stop", answer.text
        person = json.loads(answer.text)
        assert set(person) == {"name", "age", "tags"} and len(person["name"]) <= 12
        assert type(person["age"]) is int and 0 <= person["age"] <= 150
        assert set(person["tags"]) <= {"a", "b"} and len(person["tags"]) <= 3


@pytest.mark.parametrize("options", [GREEDY, HOT], ids=["greedy", "hot"])
@pytest.mark.parametrize(
    "wanted,right",
    [
        ({"regex": r"[0-9]{3}-[a-f]{2,4}"}, lambda text: re.fullmatch(r"[0-9]{3}-[a-f]{2,4}", text)),
        ({"choice": ["yes", "no", "it \"depends\"\n"]}, lambda text: text in ("yes", "no", "it \"depends\"\n")),
        ({"choice": [f"a/{i}.b" for i in range(5000)]}, lambda text: re.fullmatch(r"a/[0-9]{1,4}\.b", text)),
        ({"grammar": 'root ::= "x" | "(" root ")"'}, lambda text: re.fullmatch(r"(\(*)x(\)*)", text)
         and text.count("(") == text.count(")")),
        ({"grammar": 'start: "a" start "b" | "c"'}, lambda text: re.fullmatch(r"a*cb*", text)
         and text.count("a") == text.count("b")),
    ],
    ids=["regex", "choice", "many", "gbnf", "lark"],
)  # fmt: skip
def test_answers_are_what_was_asked_for(llm, options, wanted, right):
    for answer in answers(llm, **options, n=4, structured_outputs=wanted):
        assert right(answer.text) or answer.finish_reason == "length", (answer.text, answer.finish_reason)
        assert answer.finish_reason in ("stop", "length")


def test_any_object_and_a_cut_answer(llm):
    for answer in answers(llm, **HOT, n=4, structured_outputs=StructuredOutputs(json_object=True)):
        assert answer.text.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
    (short,) = answers(llm, temperature=0, max_tokens=3, structured_outputs={"json": PERSON})
    assert short.finish_reason == "length" and len(short.token_ids) == 3


def test_logprobs_are_of_the_unmasked_model_and_stops_still_end(llm):
    (free,) = answers(llm, **GREEDY, logprobs=2)
    (bound,) = answers(llm, **GREEDY, logprobs=2, structured_outputs={"regex": "[0-9]{4}"})
    assert re.fullmatch("[0-9]{4}", bound.text)
    best = list(free.logprobs[0].items())
    assert all(bound.logprobs[0][token].logprob == value.logprob for token, value in best if token in bound.logprobs[0])
    assert all(entry[token].rank >= 1 for token, entry in zip(bound.token_ids, bound.logprobs, strict=True))
    (stopped,) = answers(llm, **GREEDY, stop=["2", "1", "0", "3"], structured_outputs={"regex": "[0-3]{9}"})
    assert stopped.text == "" and stopped.finish_reason == "stop"


def test_neighbours_in_the_batch_are_not_disturbed(demo_engine):
    """Structured and plain requests in one batch, with preemption: each as if alone."""
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    bound = SamplingParams(temperature=0, max_tokens=60, structured_outputs={"json": PERSON})
    hot = SamplingParams(temperature=1.0, seed=3, max_tokens=60, structured_outputs={"regex": "[a-z ]{30}"})
    prompts = ["import os\n", PROMPT, "def f(x):\n", "{", "class A:\n", "x = "] * 2
    params = [plain, bound, plain, hot, plain, bound] * 2
    with LLM(demo_engine) as llm:
        alone = [
            llm.generate(*one, progress=False)[0].outputs[0].token_ids for one in zip(prompts, params, strict=True)
        ]
    with LLM(demo_engine, num_kv_pages=14, max_num_seqs=8) as llm:  # too few for all at a time
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, params, progress=False)]
        assert llm.metrics().preemptions > 0
    assert found == alone


def test_trees_of_drafts_follow_the_grammar(llm):
    """Each node's mask is that after its own path; what does not fit, or ends the answer, goes with all behind it."""
    grammars = Grammars(llm.text.tokenizer.to_str(), llm.vocab_size, llm._session.scheduler.eos_token_ids)
    matcher = grammars.matcher(StructuredOutputs(regex="[ab][cd][0-9]{3}"))
    a, b, c, d, x, one = (llm.text.encode(text, add_special_tokens=False)[0] for text in "abcdx1")
    tree = Tree([a, c, b, x, d, c, one, one, x], [-1, 0, -1, -1, 2, 2, 4, 3, 5])
    fit = matcher.fitting(tree)
    assert fit == (a, c, b, d, c, one) and fit.parents == (-1, 0, -1, 2, 2, 3)
    before, masks = matcher.mask.copy(), matcher.masks(fit)
    assert np.array_equal(matcher.mask, before) and np.array_equal(masks[0], before) and len(masks) == 1 + len(fit)
    for i, mask in enumerate(masks[1:]):
        alone = grammars.matcher(StructuredOutputs(regex="[ab][cd][0-9]{3}"))
        assert not any(map(alone.advance, fit.up_to(i))) and np.array_equal(alone.mask, mask)
    assert matcher.fitting([a, c, x]) == [a, c] and not matcher.advance(b), "it is where it was"


@pytest.mark.parametrize("draft", [[' {"'], [' {"', '"'], ['"', '"']])
def test_masks_behind_drafts_that_did_not_hold(llm, draft):
    """llguidance, rolled back behind a mask, would not let the list that begins after the draft be empty."""
    grammars = Grammars(llm.text.tokenizer.to_str(), llm.vocab_size, llm._session.scheduler.eos_token_ids)
    matcher, alone = (grammars.matcher(StructuredOutputs(json_object=True)) for _ in range(2))
    tokens = [*llm.text.encode('{"a":', add_special_tokens=False), *llm.text.encode(' ["', add_special_tokens=False)]
    guessed = [token for text in draft for token in llm.text.encode(text, add_special_tokens=False)]
    for token in tokens:
        matcher.masks(matcher.fitting(guessed))
        assert not matcher.advance(token) and not alone.advance(token)
        assert np.array_equal(matcher.mask, alone.mask)


def test_masks_are_those_of_the_tokens_that_may_follow(llm):
    grammars = Grammars(llm.text.tokenizer.to_str(), llm.vocab_size, llm._session.scheduler.eos_token_ids)
    matcher = grammars.matcher(StructuredOutputs(choice=["ab", "abc"]))

    def allowed():
        bits = np.unpackbits(matcher.mask.view(np.uint8), count=llm.vocab_size, bitorder="little")
        return {llm.text.token_text(int(token)) for token in np.flatnonzero(bits)}

    assert {"a"} <= allowed() <= {"a", "ab", "abc"}
    (token,) = llm.text.encode("a", add_special_tokens=False)
    assert not matcher.advance(token)
    assert {"b"} <= allowed() <= {"b", "bc"}
    (token,) = llm.text.encode("b", add_special_tokens=False)
    assert not matcher.advance(token)
    assert "c" in allowed() and len(allowed()) == 2, "the end, too"
    with pytest.raises(RequestError, match="cannot be kept after 3 tokens"):
        matcher.advance(token)


# each x may belong to any of 2^20 places: past some 30 of them the library has more states than it will keep
AMBIGUOUS = "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1} | a{i + 1}\n" for i in range(20)) + 'a20: "x"*'


@pytest.mark.parametrize("speculate", [None, "ngram"])
def test_a_grammar_that_the_library_gives_up_on_fails_alone(demo_engine, speculate):
    plain = dict(temperature=0, max_tokens=40)
    with LLM(demo_engine, speculate=speculate, adapt_drafts=False) as llm:
        alone = answers(llm, **plain)[0].token_ids
        beside = llm.stream(PROMPT, SamplingParams(**plain))
        begun = next(beside)
        with pytest.raises(RequestError, match=r"^structured_outputs cannot be kept after \d+ tokens"):
            answers(llm, "xxxxxxxx", temperature=0, n=2, max_tokens=60, structured_outputs={"grammar": AMBIGUOUS})
        assert [begun, *beside][-1].outputs[0].token_ids == alone
        assert llm.healthy and not llm._session._open


def test_drafts_that_the_library_gives_up_on_say_nothing_of_the_answer(llm):
    grammars = Grammars(llm.text.tokenizer.to_str(), llm.vocab_size, llm._session.scheduler.eos_token_ids)
    matcher = grammars.matcher(StructuredOutputs(grammar=AMBIGUOUS))
    (x,) = llm.text.encode("x", add_special_tokens=False)
    matcher.advance(x)
    before = matcher.mask.copy()
    fit = matcher.fitting([x] * 60)
    assert 0 < len(fit) < 60 and len(matcher.masks(fit)) == len(fit) + 1
    assert np.array_equal(matcher.mask, before) and not matcher.advance(x)
    assert not matcher.fitting([llm.vocab_size]) and not matcher.advance(x), "of a vocabulary that is padded"


@pytest.mark.parametrize(
    "options,words",
    [
        ({"structured_outputs": {}}, "asks for nothing"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "json_object and regex"),
        ({"structured_outputs": {"jsn": "{}"}}, "one of json, json_object"),
        ({"structured_outputs": {"choice": []}}, "choice is"),
        ({"structured_outputs": {"choice": "yes"}}, "choice is 'yes'"),
        ({"structured_outputs": {"choice": 5}}, "choice is 5"),
        ({"structured_outputs": {"json_object": "no"}}, "json_object is 'no'"),
        ({"structured_outputs": {"regex": 3}}, "regex is 3"),
        ({"structured_outputs": {"regex": "[a-"}}, "regex"),
        ({"structured_outputs": {"json": "{"}}, "json of structured_outputs cannot be read"),
        ({"structured_outputs": {"json": {"not": {"type": "string"}}}}, '"not"'),
        ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ({"structured_outputs": {"json": {"$ref": "http://example.com/a"}}}, "refused"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "grammar"),
        ({"structured_outputs": {"regex": "a" * 200000}}, "at most 131072"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens cannot be kept"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos cannot be kept"),
    ],
)
def test_what_cannot_be_is_one_sentence(llm, options, words):
    with pytest.raises(RequestError, match=re.escape(words)) as found:
        answers(llm, **options)
    assert "\n" not in str(found.value)
