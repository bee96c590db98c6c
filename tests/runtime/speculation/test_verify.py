"""Verification: what holds, and that answers with drafts are distributed exactly as without."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from ingot.runtime import sampler as sampling
from ingot.runtime.placement import Placement
from ingot.runtime.request import SamplingParams
from ingot.runtime.sampler import Sampler
from ingot.runtime.speculation.tree import Tree, depth_of, first, likeliest, no_deeper, parents_of
from ingot.runtime.speculation.verify import Nodes, holding, moves
from random_tree import path_to, random_parents

VOCAB, LENGTH, PROMPT, STOP = 5, 3, [1, 4], [3]
CHAIN, TREE = [-1, 0], [-1, -1, 0, 1, 1]  # parents of what is drafted
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


def drafted(draft, newest, parents, rng):
    """Tokens [R, 1 + drafts]: the newest, then those drawn from draft [VOCAB, VOCAB], siblings without replacement."""
    fed = np.empty((len(newest), 1 + len(parents)), np.int64)
    fed[:, 0] = newest
    for i, parent in enumerate(parents):
        chances = draft[fed[:, parent + 1]].copy()
        for sibling in (j for j in range(i) if parents[j] == parent):
            chances[np.arange(len(fed)), fed[:, sibling + 1]] = 0
        at = rng.random((len(fed), 1)) * chances.sum(-1, keepdims=True)
        fed[:, i + 1] = (at > chances.cumsum(-1)).sum(-1).clip(0, VOCAB - 1)
    return fed


def generate(target, draft, params, num, rng, rule=holding, parents=CHAIN):
    """target, draft [VOCAB, VOCAB]: logits and probabilities after each token -> answers [num, LENGTH], mean held.

    `num` requests with a seed each, verified together; tokens past LENGTH are thrown away.
    """
    depth = [0] + [len(path_to(parents, i)) for i in range(len(parents))]
    sampler, rows = Sampler(num, VOCAB), np.arange(num)
    for row, seed in enumerate(rng.integers(0, 1 << 62, num).tolist()):
        sampler.place(Placement(row, params, seed, len(PROMPT), STOP, PROMPT))
    answers = [[] for _ in rows]
    steps = tokens_held = 0
    while len(rows := np.array([row for row in rows if len(answers[row]) < LENGTH])):
        fed = drafted(draft, [answers[row][-1] if answers[row] else PROMPT[-1] for row in rows], parents, rng)
        guesses, nodes = np.full_like(fed, -1), None
        guesses[:, :-1] = fed[:, 1:]
        if parents is not CHAIN:
            places = np.arange(fed.size).reshape(fed.shape)[:, :1] + 1 + np.array([-1, *parents])
            places[:, 0], own = -1, fed.copy()
            own[:, 0] = -1
            nodes = Nodes(own.reshape(-1), places.reshape(-1))
        lengths = np.array([len(answers[row]) for row in rows])[:, None] + len(PROMPT) + np.array(depth)
        told = guesses.reshape(-1), nodes
        found, _ = sampler.sample(
            target[fed.reshape(-1)].clone(), np.repeat(rows, fed.shape[1]), lengths.reshape(-1), (), *told
        )
        held = rule(found, *told).reshape(fed.shape)
        for row, some, holds in zip(rows, found.reshape(fed.shape), held, strict=True):
            answers[row] += some[holds].tolist()
        steps, tokens_held = steps + len(rows), tokens_held + int(held.sum())
    return np.array([answer[:LENGTH] for answer in answers]), tokens_held / steps


def statistic(options, rule, num_tokens, seed, parents=CHAIN):
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
        found, mean = generate(target, draft, params, min(4000, answers - begin), rng, rule, parents)
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


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_answers_are_distributed_as_without_trees(options):
    assert statistic(options, holding, 100_000, 2, TREE) < 5


def no_rule(tokens, drafts, nodes=None):
    """Whatever was drafted, all samples count."""
    return np.ones(len(tokens), bool)


def one_too_many(tokens, drafts, nodes=None):
    """The sample after the first wrong draft counts, too."""
    held = holding(tokens, drafts)
    return held | (np.roll(held, 1) & np.roll(drafts >= 0, 1))


@pytest.mark.parametrize("rule", [no_rule, one_too_many])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_broken_rule_fails_the_same_test(options, rule, monkeypatch):
    monkeypatch.setattr(sampling, "holding", rule)
    assert statistic(options, rule, 200_000 // 8, 1) > 20


def the_first_child(tokens, drafts, nodes):
    """Of a tree, whatever was sampled."""
    held = holding(tokens, drafts, nodes)
    return held | (np.roll(held, 1) & (nodes.parents == np.arange(len(held)) - 1))


def test_a_broken_rule_of_trees_fails_the_same_test(monkeypatch):
    monkeypatch.setattr(sampling, "holding", the_first_child)
    assert statistic(OPTIONS[1], the_first_child, 200_000 // 8, 1, TREE) > 20


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


@pytest.mark.parametrize("seed", range(4))
def test_what_holds_of_a_tree_is_the_plain_reading(seed):
    """And what moves where: the path that holds becomes a chain."""
    rng, spread = random.Random(seed), np.random.default_rng(seed)
    drafts = []
    for _ in range(30):
        parents = random_parents(rng, rng.randrange(12))
        tokens = [len([j for j in range(i) if parents[j] == parents[i]]) for i in range(len(parents))]
        drafts.append(Tree(tokens, parents) if rng.random() < 0.8 else tokens)
    nodes = Nodes.of(drafts)
    sampled = spread.integers(0, 2, len(nodes.tokens))
    wanted, moved, begin = [], {}, 0
    for some in drafts:
        mine, parents = sampled[begin : begin + 1 + len(some)], parents_of(some)
        path = [-1]
        while after := [i for i in range(len(some)) if parents[i] == path[-1] and some[i] == mine[path[-1] + 1]]:
            path += after
        wanted += [i in path for i in range(-1, len(some))]
        moved |= {begin + 1 + i: begin + at for at, i in enumerate(path) if i + 1 != at}
        begin += 1 + len(some)
        if isinstance(some, Tree):
            assert some.path([mine[i + 1] for i in path]) == path[1:]
            assert [some.up_to(i) for i in range(len(some))] == [
                [some[j] for j in path_to(parents, i)] for i in range(len(some))
            ]
    held = holding(sampled, np.zeros(len(sampled)), nodes)
    assert held.tolist() == wanted and moved
    assert dict(zip(*(part.tolist() for part in moves(held, nodes)), strict=True)) == moved


def test_trees_are_checked_cut_and_told_apart():
    tree = Tree([5, 6, 5, 7], [-1, -1, 1, 2])
    assert tree.depths == [1, 1, 2, 3] and depth_of(tree) == 3 and depth_of([1, 2]) == 2
    assert first(tree, 3) == (5, 6, 5) and first(tree, 3).parents == (-1, -1, 1) and first([1, 2], 1) == [1]
    assert no_deeper(tree, 1).parents == (-1, -1) and no_deeper(tree, 0) == () and no_deeper([1, 2], 1) == [1]
    assert tree.keep([True, False, True, True]) == (5,)
    assert tree.keep([False, True, True, True]).parents == (-1, 0, 1)
    assert [bits & 0xFFFFFFFF for bits in tree.ancestors().tolist()] == [0x1FFFFFFF, 0x2FFFFFFF, 0x6FFFFFFF, 0xEFFFFFFF]
    for tokens, parents in (([1, 2], [-1]), ([1, 2], [0, -1]), ([1, 1], [-1, -1]), ([1], [-2])):
        with pytest.raises(ValueError):
            Tree(tokens, parents)


@pytest.mark.parametrize("seed", range(5))
def test_the_likeliest_tree_begins_with_the_likeliest_path(seed):
    rng, spread = random.Random(seed), np.random.default_rng(seed)
    parents = random_parents(rng, 40)
    chances = np.zeros(40)
    for i, parent in enumerate(parents):
        chances[i] = (chances[parent] if parent >= 0 else 0.0) - spread.exponential()
    (tree,) = likeliest(np.arange(40)[None], np.array([parents]), chances[None], 12)
    assert {*tree} == {*np.argsort(-chances)[:12].tolist()}
    assert [parents[node] for node in tree] == [tree[i] if i >= 0 else -1 for i in tree.parents]
    chain, at = [], -1
    while children := [node for node in tree if parents[node] == at]:
        chain.append(at := max(children, key=lambda node: chances[node]))
    assert [*tree[: len(chain)]] == chain
