"""Verification: what holds, and that answers with drafts are distributed exactly as without."""

import itertools
import math

import numpy as np
import pytest
import torch
from ingot.runtime import sampler as sampling
from ingot.runtime.placement import Placement
from ingot.runtime.request import SamplingParams
from ingot.runtime.sampler import Sampler
from ingot.runtime.speculation.verify import holding

VOCAB, LENGTH, DRAFTS, PROMPT, STOP = 5, 3, 2, [1, 4], [3]
OPTIONS = [
    {"temperature": 0.8, "top_p": 0.85},
    {"temperature": 1.4, "repetition_penalty": 1.5, "frequency_penalty": 0.6, "presence_penalty": -0.4},
    {"top_k": 4, "top_p": 0.95, "temperature": 1.1, "frequency_penalty": 1.0, "repetition_penalty": 0.8},
]


def probabilities(logits, params, output):
    """Of the next token, by the definitions of the options, one after the other, in float64."""
    x = logits.double().numpy().copy()
    for token in range(VOCAB):
        if token in PROMPT or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
    weights = np.exp((x - x.max()) / params.temperature)
    if params.top_k:
        weights[weights < np.sort(weights)[::-1][params.top_k - 1]] = 0
    if params.top_p < 1:
        ordered = np.sort(weights)[::-1]
        weights[weights < ordered[np.searchsorted(ordered.cumsum(), params.top_p * weights.sum())]] = 0
    return weights / weights.sum()


def generate(target, draft, params, num, rng, rule=holding):
    """target, draft [VOCAB, VOCAB]: logits and probabilities after each token -> answers [num, LENGTH], mean held.

    `num` requests with a seed each, verified together; tokens past LENGTH are thrown away.
    """
    sampler, rows = Sampler(num, VOCAB), np.arange(num)
    for row, seed in enumerate(rng.integers(0, 1 << 62, num).tolist()):
        sampler.place(Placement(row, params, seed, len(PROMPT), STOP, PROMPT))
    cumulative = torch.from_numpy(draft.cumsum(-1))
    answers = [[] for _ in rows]
    steps = tokens_held = 0
    while len(rows := np.array([row for row in rows if len(answers[row]) < LENGTH])):
        fed = np.empty((len(rows), 1 + DRAFTS), np.int64)  # the newest token, then the drafts
        fed[:, 0] = [answers[row][-1] if answers[row] else PROMPT[-1] for row in rows]
        for i in range(DRAFTS):
            fed[:, i + 1] = (rng.random((len(rows), 1)) > cumulative[fed[:, i]].numpy()).sum(-1).clip(0, VOCAB - 1)
        guesses = np.full_like(fed, -1)
        guesses[:, :-1] = fed[:, 1:]
        lengths = np.array([len(answers[row]) for row in rows])[:, None] + len(PROMPT) + np.arange(1 + DRAFTS)
        found, _ = sampler.sample(
            target[fed.reshape(-1)].clone(), np.repeat(rows, 1 + DRAFTS), lengths.reshape(-1), (), guesses.reshape(-1)
        )
        held = rule(found, guesses.reshape(-1)).reshape(fed.shape)
        for row, some, holds in zip(rows, found.reshape(fed.shape), held, strict=True):
            answers[row] += some[holds].tolist()
        steps, tokens_held = steps + len(rows), tokens_held + int(held.sum())
    return np.array([answer[:LENGTH] for answer in answers]), tokens_held / steps


def statistic(options, rule, num_tokens, seed):
    """Pearson's statistic of whole answers against their exact probabilities, in standard deviations."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(**options)
    target = torch.from_numpy(rng.normal(0, 1.5, (VOCAB, VOCAB))).float()
    draft = rng.dirichlet(np.ones(VOCAB), VOCAB)
    exact = np.zeros((VOCAB,) * LENGTH)
    for answer in itertools.product(range(VOCAB), repeat=LENGTH):
        chance = 1.0
        for i, token in enumerate(answer):
            chance *= probabilities(target[answer[i - 1] if i else PROMPT[-1]], params, list(answer[:i]))[token]
        exact[answer] = chance
    answers, counts, means = num_tokens // LENGTH, np.zeros_like(exact), []
    for begin in range(0, answers, 4000):
        found, mean = generate(target, draft, params, min(4000, answers - begin), rng, rule)
        np.add.at(counts, tuple(found.T), 1)
        means.append(mean)
    assert np.mean(means) > 1.1, "drafts were hardly ever accepted: nothing was tested"
    expected = exact * counts.sum()
    if counts[expected < 1e-9].sum():
        return math.inf  # a token that is filtered out
    rare = (expected < 8) & (expected > 1e-9)
    groups = [(counts[~rare & (expected > 0)], expected[~rare & (expected > 0)])]
    if rare.any():
        groups.append((counts[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    c, e = (np.concatenate([group[i] for group in groups]) for i in range(2))
    freedom = len(c) - 1
    return float((((c - e) ** 2 / e).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("options", OPTIONS)
def test_answers_are_distributed_as_without_drafts(options):
    """200,000 tokens of a random target, drafts of a random other one; five standard deviations."""
    assert statistic(options, holding, 200_000, 1) < 5


def no_rule(tokens, drafts):
    """Whatever was drafted, all samples count."""
    return np.ones(len(tokens), bool)


def one_too_many(tokens, drafts):
    """The sample after the first wrong draft counts, too."""
    held = holding(tokens, drafts)
    return held | (np.roll(held, 1) & np.roll(drafts >= 0, 1))


@pytest.mark.parametrize("rule", [no_rule, one_too_many])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_broken_rule_fails_the_same_test(options, rule, monkeypatch):
    monkeypatch.setattr(sampling, "holding", rule)
    assert statistic(options, rule, 200_000 // 8, 1) > 20


def test_counting_a_failed_draft_fails_the_same_test(monkeypatch):
    """Penalties that count what was sampled after a wrong draft."""
    monkeypatch.setattr(sampling, "holding", no_rule)
    assert statistic(OPTIONS[1], holding, 200_000 // 8, 1) > 20


def test_what_holds():
    drafts = np.array([4, 7, -1, -1, 5, 6, -1, 2, -1])
    tokens = np.array([4, 8, 9, 3, 1, 6, 0, 2, 2])
    assert holding(tokens, drafts).tolist() == [True, True, False, True, True, False, False, True, True]


@pytest.mark.parametrize("seed", range(8))
def test_what_holds_is_the_plain_reading(seed):
    rng = np.random.default_rng(seed)
    drafts, tokens, wanted = [], [], []
    for _ in range(20):
        num = rng.integers(0, 4)
        guesses, found = rng.integers(0, 2, num).tolist(), rng.integers(0, 2, num + 1).tolist()
        drafts += [*guesses, -1]
        tokens += found
        wanted += [guesses[:i] == found[:i] for i in range(num + 1)]
    assert holding(np.array(tokens), np.array(drafts)).tolist() == wanted


def test_samples_of_drafts_that_hold_are_those_of_one_step_each():
    """Same tokens, log-probabilities and counts as token by token, for rows with all kinds of options together."""
    bound = {"logit_bias": {0: 1.0, 2: -1.0}, "min_tokens": 3, "frequency_penalty": 0.5}
    kinds = [{"temperature": 0}, *OPTIONS, bound, {"logprobs": 2, "top_p": 0.7, "presence_penalty": 1.0}]
    all_params = [SamplingParams(**options, seed=row) for row, options in enumerate(kinds)]
    logits = torch.randn(len(kinds), 6, VOCAB, generator=torch.Generator().manual_seed(0)) * 2  # by row and length
    samplers = [Sampler(len(kinds), VOCAB) for _ in range(2)]
    for sampler in samplers:
        for row, params in enumerate(all_params):
            sampler.place(Placement(row, params, params.seed, len(PROMPT), STOP, PROMPT))
    rows = np.arange(len(kinds))
    steps = [samplers[0].sample(logits[:, i].clone(), rows, np.full(len(rows), 2 + i)) for i in range(6)]
    tokens = np.stack([found for found, _ in steps], 1)  # [rows, 6]
    drafts = np.full_like(tokens, -1)
    drafts[:, :-1] = tokens[:, :-1]
    drafts[2, 3] = (drafts[2, 3] + 1) % VOCAB
    found, logprobs = samplers[1].sample(
        logits.reshape(-1, VOCAB).clone(), rows.repeat(6), np.tile(np.arange(2, 8), len(rows)), (), drafts.reshape(-1)
    )
    held = holding(found, drafts.reshape(-1)).reshape(tokens.shape)
    assert held[2].tolist() == [True] * 4 + [False] * 2 and held.sum() == held.size - 2
    assert np.array_equal(found.reshape(tokens.shape)[held], tokens[held])
    alone = [step[-1] for _, step in steps]
    for together, single in zip(logprobs[-6:], alone, strict=True):
        assert list(together) == list(single)
        assert [e.logprob for e in together.values()] == pytest.approx([e.logprob for e in single.values()])
    whole = [row for row in rows if row != 2]
    assert samplers[0]._counts[whole].equal(samplers[1]._counts[whole])
    assert samplers[1]._counts[2].sum() == 4
