"""The sampler against a slow reference in plain Python, and its draws against exact probabilities."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.runtime.distribution import cutoffs, draw, uniforms
from ingot.runtime.request import SamplingParams
from ingot.runtime.sampler import Placement, Sampler, needs_history, top_logprobs

VOCAB = 37


def reference(logits, params, prompt=(), output=(), stop_ids=()):
    """Probability of each token, by the definitions of the options, in float64 and one token at a time."""
    x = [float(v) for v in logits]
    for token, amount in (params.logit_bias or {}).items():
        x[token] += amount
    if len(output) < params.min_tokens:
        for token in stop_ids:
            x[token] = -math.inf
    for token in range(len(x)):
        if token in prompt or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        count = list(output).count(token)
        x[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if params.temperature == 0:
        best = x.index(max(x))
        return [float(i == best) for i in range(len(x))]
    x = [v / params.temperature for v in x]
    best = max(x)
    weight = [math.exp(v - best) for v in x]
    weight = [w if w >= params.min_p else 0.0 for w in weight]
    if params.top_k:
        kth = sorted(weight, reverse=True)[min(params.top_k, len(x)) - 1]
        weight = [w if w >= kth else 0.0 for w in weight]
    if params.top_p < 1:
        total, held, lowest = sum(weight), 0.0, 0.0
        for w in sorted(weight, reverse=True):
            if held < params.top_p * total:
                held, lowest = held + w, w
        weight = [w if w >= lowest else 0.0 for w in weight]
    return [w / sum(weight) for w in weight]


def chi_square_fits(counts, probabilities):
    """Pearson's test at about five standard deviations; a token of probability 0 must not occur at all."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities)
    assert counts[probabilities == 0].sum() == 0, "a token that is filtered out was drawn"
    expected = probabilities * counts.sum()
    rare = expected < 8
    groups = [(counts[i], expected[i]) for i in np.flatnonzero(~rare)] + [(counts[rare].sum(), expected[rare].sum())]
    statistic = sum((c - e) ** 2 / e for c, e in groups if e > 0)
    freedom = max(1, len(groups) - 1)
    return statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.08},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.03},
    {"repetition_penalty": 1.6},
    {"presence_penalty": 1.2, "frequency_penalty": 0.4},
    {"repetition_penalty": 0.7, "frequency_penalty": -0.5, "top_p": 0.9},
    {"logit_bias": {3: 4.0, 9: -3.0}, "top_k": 8},
    {"min_tokens": 9, "temperature": 1.2, "top_p": 0.85},
    {"temperature": 0},
]
PROMPT, OUTPUT, STOP = [1, 4, 4, 9], [2, 9, 2, 2], [5, 8]


@pytest.fixture(scope="module")
def logits():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


@torch.inference_mode()
def test_mixed_batch_by_distribution(logits):
    """Every option in a row of its own, one batch, 12,000 draws; row r's draws must follow row r's options."""
    sampler = Sampler(len(OPTIONS), VOCAB)
    counts = np.zeros((len(OPTIONS), VOCAB))
    order = np.array(random.Random(1).sample(range(len(OPTIONS)), len(OPTIONS)))
    all_params = [SamplingParams(**o, seed=100 + r) for r, o in enumerate(OPTIONS)]
    placements = [
        Placement(r, p, p.seed, len(PROMPT), STOP, PROMPT + OUTPUT if needs_history(p) else ())
        for r, p in enumerate(all_params)
    ]
    for placement in placements:
        sampler.place(placement)
    start = len(PROMPT) + len(OUTPUT)
    history = np.array([needs_history(all_params[r]) for r in order])
    for i in range(12_000):
        # the same position of ever new requests: the seed moves, the counts do not
        sampler._seed[:] = [1_000_003 * i + r for r in range(len(OPTIONS))]
        tokens, logprobs = sampler.sample(logits.repeat(len(order), 1), order, np.full(len(order), start))
        counts[order, tokens] += 1
        sampler._counts[order[history], tokens[history]] -= 1
        assert logprobs is None
    for options, params, row in zip(OPTIONS, all_params, counts, strict=True):
        assert chi_square_fits(row, reference(logits, params, PROMPT, OUTPUT, STOP)), options


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 1.0, 2.5, 4.0]), min_size=2, max_size=300),
    st.integers(0, 12),
    st.just(1.0) | st.floats(0.05, 1 - 1e-9),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.floats(0.2, 3.0),
)
def test_kept_set_equals_reference(values, top_k, top_p, min_p, temperature):
    """Ties everywhere: the kept set is that of the reference, and does not depend on which other rows there are."""
    # away from the boundary, where the last bit of a sum would decide
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    x = torch.tensor(values)
    x = ((x - x.max()) / temperature).unsqueeze(0)
    kept = [x[0] >= cutoffs(x, x.exp(), np.array([top_k]), np.array([top_p]), np.array([min_p]))[0]]
    both = torch.cat((x, x.flip(1)))
    kept.append(
        both[0] >= cutoffs(both, both.exp(), np.array([top_k, 0]), np.array([top_p, 0.999]), np.array([min_p, 0.0]))[0]
    )
    assert kept[0].equal(kept[1])
    wanted = torch.tensor(reference(values, params)) > 0
    if not kept[0].equal(wanted):
        nearby = [reference(values, SamplingParams(temperature=temperature, top_k=top_k, top_p=p, min_p=m))
                  for p in (top_p * (1 - 1e-6), min(1.0, top_p * (1 + 1e-6)))
                  for m in (min_p * (1 - 1e-6), min(1.0, min_p * (1 + 1e-6)))]  # fmt: skip
        assert any(kept[0].equal(torch.tensor(r) > 0) for r in nearby)


def test_nucleus_wider_than_the_first_candidates():
    x = torch.zeros(2, 1000)
    x[:, 0] = 1.0
    x[1] -= torch.arange(1000) * 1e-3
    x -= x.amax(-1, keepdim=True)
    cut = cutoffs(x, x.exp(), np.array([0, 0]), np.array([0.9, 0.9]), np.array([0.0, 0.0]))
    for row in range(2):
        kept = x[row] >= cut[row]
        assert kept.tolist() == [p > 0 for p in reference(x[row].tolist(), SamplingParams(top_p=0.9))]


def test_seed_decides_whatever_the_batch(logits):
    def run(row, others):
        sampler = Sampler(8, VOCAB)
        rows = [*others, row]
        for r in rows:
            params = SamplingParams(seed=7 if r == row else r + 50, top_p=0.9, temperature=1.1)
            sampler.place(Placement(r, params, params.seed, 2))
        tokens = []
        for position in range(2, 34):
            found, _ = sampler.sample(logits.repeat(len(rows), 1), np.array(rows), np.full(len(rows), position))
            tokens.append(int(found[-1]))
        return tokens

    alone = run(0, [])
    assert alone == run(5, [0, 2, 3]) == run(1, [7])
    assert len(set(alone)) > 3


def test_counts_follow_the_output():
    """Greedy with a presence penalty walks down the logits, one token after the other; a new request starts afresh."""
    sampler = Sampler(3, VOCAB)
    x = -0.01 * torch.arange(VOCAB).float().unsqueeze(0)
    params = SamplingParams(temperature=0, presence_penalty=1.5)
    for _ in range(2):
        sampler.place(Placement(2, params, 0, 1, tokens=[0]))
        walked = [int(sampler.sample(x.clone(), np.array([2]), np.array([i + 1]))[0][0]) for i in range(5)]
        assert walked == [0, 1, 2, 3, 4]
    sampler.place(Placement(2, params, 0, 1, tokens=[30, 0, 1, 2]))  # back after preemption: the output counts
    assert sampler.sample(x.clone(), np.array([2]), np.array([4]))[0][0] == 3


def test_min_tokens_masks_stop_ids_until_enough():
    sampler = Sampler(1, VOCAB)
    x = torch.zeros(1, VOCAB)
    x[0, 5] = 9.0
    sampler.place(Placement(0, SamplingParams(temperature=0, min_tokens=2), 0, 3, stop_ids=(5,)))
    picked = [int(sampler.sample(x.clone(), np.array([0]), np.array([p]))[0][0]) for p in (3, 4, 5)]
    assert picked[0] != 5 and picked[1] != 5 and picked[2] == 5


def test_logprobs_are_raw_and_ranked(logits):
    sampler = Sampler(2, VOCAB)
    sampler.place(Placement(0, SamplingParams(temperature=0, logit_bias={7: 100.0}, logprobs=3), 0, 1))
    sampler.place(Placement(1, SamplingParams(temperature=0), 0, 1))
    tokens, logprobs = sampler.sample(logits.repeat(2, 1), np.array([1, 0]), np.array([1, 1]))
    assert tokens[1] == 7 and logprobs[0] is None
    exact = [v - math.log(sum(math.exp(u) for u in logits.tolist())) for v in logits.tolist()]
    entry = logprobs[1]
    best = sorted(range(VOCAB), key=lambda t: -exact[t])
    assert list(entry) == [7, *best[:3]]
    for token, found in entry.items():
        assert found.logprob == pytest.approx(exact[token], abs=1e-5)
        assert found.rank == best.index(token) + 1


def test_prompt_logprobs_zero_gives_the_chosen_only(logits):
    rows = top_logprobs(torch.stack((logits, -logits)), torch.tensor([4, 4]), np.array([0, 0]))
    assert [list(r) for r in rows] == [[4], [4]]


def test_tiny_temperature_is_greedy(logits):
    sampler = Sampler(1, VOCAB)
    sampler.place(Placement(0, SamplingParams(temperature=1e-40), 3, 1))
    assert sampler.sample(logits.unsqueeze(0).clone(), np.array([0]), np.array([1]))[0][0] == int(logits.argmax())


def test_draw_at_the_ends():
    """Weight 0 is never drawn, not at uniform 0 nor just below 1, whatever the block it sits in."""
    weights = torch.zeros(2, 300)
    weights[:, [70, 130, 200]] = torch.tensor([0.1, 1e-8, 0.7])
    low = draw(weights, np.zeros(2))
    high = draw(weights, np.full(2, 1 - 2.0**-52))
    assert low.tolist() == [70, 70] and high.tolist() == [200, 200]


def test_uniforms_are_uniform():
    u = uniforms(np.arange(20_000, dtype=np.uint64) // 100, np.arange(20_000) % 100)
    assert 0 <= u.min() and u.max() < 1
    counts, _ = np.histogram(u, bins=50, range=(0, 1))
    assert chi_square_fits(counts, np.full(50, 0.02))
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
