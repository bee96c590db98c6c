"""Sampling kernels against their definition in torch: on the GPU where there is one, interpreted otherwise."""

import os
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from ingot.plugins import jit, tactics_of
from ingot.plugins.sample import adjusted, probabilities, sample
from ingot.plugins.sample.reference import IN_PROMPT, gumbel, kept
from ingot.plugins.sample.select import threshold
from ingot.plugins.tactic import Site, Tensor
from random_tree import bits_of, path_to, random_parents
from sample_run import DRAFTS, GPU, compare, make_inputs, run, site_of
from triton_run import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 37, 4099])
def test_greedy_is_the_argmax_and_the_lowest_index_on_ties(dtype, vocab):
    logits = (torch.randn(4, vocab) * 3).to(dtype)
    best = torch.randint(vocab, (2,)).sort().values
    logits[0] = -4.0  # all below zero
    logits[0, best] = -0.5
    logits[1] = 0.0
    logits[1, : vocab // 2] = -0.0  # equal to 0
    tokens = compare(make_inputs(logits, rows=[5, 0, -1, 2], num_rows=7))
    assert tokens[0] == best[0] and tokens[1] == 0 and tokens[2] == -1
    assert tokens[3] == logits[3].argmax()


def test_padding_and_hostile_logits_write_nothing_and_never_leave_the_vocabulary():
    logits = torch.full((4, 900), torch.nan)
    logits[1], logits[2] = -torch.inf, torch.inf
    inputs = make_inputs(logits, rows=[0, 1, 2, -1], num_rows=4, temperature=0.7, top_k=3, top_p=0.5, min_p=0.1,
                         truncate=True, penalties=torch.rand(4, 3))  # fmt: skip
    (tokens,), after = run(inputs)
    assert ((tokens[:3] >= 0) & (tokens[:3] < 900)).all() and tokens[3] == -1
    assert after[15][3] == 77 and after[9][3].eq(0).all() and after[9][:3].sum() == 3


def test_noise_is_philox_and_gumbel():
    """Known answer of Philox4x32-7 from Random123's own vectors: counter and key 0."""
    seed, position = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    words = torch.tensor([0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]).double()
    expected = -(-torch.log1p(-(words + 0.5) * 2.0**-32)).log()
    torch.testing.assert_close(gumbel(seed, position, 4)[0], expected.float())
    noise = gumbel(torch.arange(4), torch.arange(4), 50000).double()
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - torch.pi**2 / 6) < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_tokens_are_the_reference_s(dtype):
    """Mixed with greedy rows; temperatures from next to nothing to high."""
    logits = (torch.randn(6, 2061) * 2).to(dtype)
    heat = {0: 1.0, 1: 0.0, 2: 0.3, 3: 5.0, 4: 1e-30, 6: 1.0}
    compare(make_inputs(logits, rows=[0, 1, 2, 3, 4, -1], num_rows=7, temperature=heat), every=True)


TRUNCATIONS = [
    dict(top_k=1), dict(top_k=7), dict(top_k=400), dict(top_k=5000), dict(top_p=0.3), dict(top_p=0.95),
    dict(top_p=1e-6), dict(min_p=0.2), dict(min_p=1.0), dict(top_k=50, top_p=0.8), dict(top_k=50, min_p=0.05),
    dict(top_k=20, top_p=0.9, min_p=0.1), dict(top_p=0.6, min_p=0.3), dict(),
]  # fmt: skip


@triton.jit
def thresholds_kernel(tables, states, top_k, top_p, out, V: tl.constexpr, LEVELS: tl.constexpr):
    r = tl.program_id(0)
    least = threshold(tables, states, r, tl.load(top_k + r), tl.load(top_p + r), V, LEVELS)
    tl.store(out + r, least.to(tl.int64) << (32 - 4 * LEVELS))


@pytest.mark.parametrize("dtype,ties", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_the_kept_set_is_the_reference_s(dtype, ties):
    """Truncations in a batch: the thresholds left in the workspace, and the tokens drawn."""
    size, vocab = len(TRUNCATIONS), 1100
    logits = torch.randn(1, vocab).repeat(size, 1) * 2
    logits = ((logits * 2).round() / 2 if ties else logits).to(dtype)
    options = {n: {i: t[n] for i, t in enumerate(TRUNCATIONS) if n in t} for n in ("top_k", "top_p", "min_p")}
    heat = torch.linspace(0.3, 2, size)
    inputs = make_inputs(logits, temperature=dict(enumerate(heat.tolist())), truncate=True, **options)
    truncation = inputs[4:7]
    expected = kept(logits.float(), inputs[3], *truncation)
    for tactic in tactics_of("Sample")(site_of(inputs))[: None if GPU else 1]:
        workspace = torch.full((tactic.workspace,), 0xFF, dtype=torch.uint8, device=DEVICE)
        on_device = [None if x is None else x.clone().to(DEVICE) for x in inputs]
        tokens = torch.full((size,), -7, dtype=torch.int32, device=DEVICE)
        jit.launch(tactic, on_device, [tokens], workspace)
        race = tactic.launches[-2]
        at = {name: argument.index for (name, _), argument in zip(race.kernel.signature, race.arguments, strict=True)}
        tables, states = (
            workspace[at[n] :][: tactic.workspace // 16 * 4].view(torch.int32) for n in ("tables", "states")
        )
        least = torch.zeros(size, dtype=torch.int64, device=DEVICE)
        levels = dict(race.kernel.constants)["LEVELS"]
        thresholds_kernel[(size,)](tables, states, *on_device[4:6], least, V=vocab, LEVELS=levels)
        bits = (logits.float() + 0.0).view(torch.int32).long()
        order = torch.where(bits < 0, ~bits, bits + 2**31) & 0xFFFFFFFF
        scaled = (logits.float() - logits.float().amax(-1, keepdim=True)) / inputs[3].unsqueeze(1)
        ours = (order >= least.cpu().unsqueeze(1)) & (scaled >= truncation[2].log().unsqueeze(1))
        assert ours.equal(expected), [i for i in range(size) if not ours[i].equal(expected[i])]
        assert tokens.cpu().equal(sample(*inputs)[0])


def chi_square(counts, chances):
    """In standard deviations from its mean: about normal."""
    used = chances > 0
    assert (counts[~used] == 0).all(), "drawn from outside the set"
    expected = chances[used] * counts.sum()
    freedom = int(used.sum()) - 1
    return float((((counts[used] - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_every_token_kept_is_drawn_at_its_rate():
    num = 20000 if GPU else 40
    logits = torch.tensor([0.0, 1.0, 1.0, 2.0, -1.0, 2.5, 0.5, 1.0, -3.0, 1.5, 0.0]).bfloat16()
    inputs = make_inputs(logits.repeat(num, 1), [0] * num, torch.arange(num), 1, temperature=1.3, truncate=True,
                         seed=11, top_k=6, top_p=0.9, min_p=0.05)  # fmt: skip
    counts = run(inputs)[0][0].long().bincount(minlength=11)
    chances = probabilities(logits[None].float(), *inputs[3:7])[0]
    assert (counts > 0).equal(chances > 0)
    assert abs(chi_square(counts, chances)) < 3  # the seed is fixed


def test_many_draws_of_the_reference_are_distributed_as_it_says():
    logits = torch.linspace(-2, 2, 40)[None]
    seed, positions = torch.full((60000,), 5), torch.arange(60000)
    for heat in (0.5, 1.0, 3.0):
        tokens = (logits + heat * gumbel(seed, positions, 40)).argmax(-1)
        chances = probabilities(logits, torch.tensor([heat]))[0]
        assert abs(chi_square(tokens.bincount(minlength=40), chances)) < 3


def test_a_token_depends_on_logits_seed_and_position_only():
    """The same in any order, batch, padding and tactic, with truncation compiled in or not, in other rows' company."""
    logits = torch.randn(5, 3001)
    seeds, heat = {i: 1000 + i for i in range(9)}, {i: 0.5 + i / 4 for i in range(9)}
    options = dict(num_rows=9, temperature=heat, seed=seeds)
    positions = torch.tensor([3, 1, 4, 1, 5])
    base = run(make_inputs(logits, [0, 1, 2, 3, 4], positions, **options))[0][0]
    order = [3, 0, 4, 2, 1]
    moved = run(make_inputs(logits[order], order, positions[order], **options, truncate=True))[0][0]
    assert moved.equal(base[order])
    padded = torch.cat((logits, torch.zeros(3, 3001)))
    rows = [0, 1, 2, 3, 4, -1, -1, -1]
    with_p = make_inputs(padded, rows, torch.cat((positions, torch.zeros(3))), **options, truncate=True,
                         top_k={2: 5}, stop={})  # fmt: skip
    tokens = run(with_p)[0][0]
    same = [0, 1, 3, 4]
    assert tokens[same].equal(base[same]) and tokens[5:].eq(-1).all()
    for i in range(5):
        assert run(make_inputs(logits[i : i + 1], [i], positions[i : i + 1], **options))[0][0][0] == base[i]
    other = run(make_inputs(logits, [0, 1, 2, 3, 4], positions + 1, **options))[0][0]
    assert not other.equal(base)


@pytest.mark.parametrize("random", [False, True])
def test_bias_min_tokens_and_penalties(random):
    vocab = 1300
    logits = torch.randn(6, vocab) * 2
    counts = torch.zeros(8, vocab, dtype=torch.int32)
    counts[:, torch.randint(vocab, (300,))] = IN_PROMPT
    counts[:, torch.randint(vocab, (300,))] += torch.randint(1, 4, (300,), dtype=torch.int32)
    penalties = torch.tensor([1.0, 0.0, 0.0]).repeat(8, 1)
    penalties[1], penalties[2], penalties[3] = torch.tensor([[1.4, 0.0, 0.0], [1.0, 0.6, 0.2], [0.8, -0.5, 1.0]])
    favourite = logits.topk(3).indices
    # the favourite last: it may be one of the others
    bias = {0: {700: 30.0}, 4: {3: 0.5, vocab - 1: -1.0, 600: 2.0, int(favourite[4, 0]): -100.0}}
    stop = {1: favourite[1].tolist(), 5: favourite[5].tolist()[:2]}
    options = {}
    if random:
        options = dict(temperature={0: 1.0, 2: 0.7, 3: 0.2, 4: 1.0, 5: 2.0}, truncate=True, top_k={2: 40, 4: 30, 5: 10},
                       top_p={3: 0.9, 4: 0.7})  # fmt: skip
    inputs = make_inputs(logits, [0, 1, 2, 3, 4, 5], torch.full((6,), 20), 8, penalties=penalties, counts=counts,
                         bias=bias, stop=stop, min_length={1: 21, 5: 20}, **options)  # fmt: skip
    tokens = compare(inputs)
    assert tokens[0] == 700
    assert int(tokens[1]) not in stop[1]
    values = adjusted(logits, inputs[2], *(x[:6] for x in inputs[8:15]))
    assert values[1, stop[1]].eq(-torch.inf).all() and values[5, stop[5]].isfinite().all()
    assert values[4, favourite[4, 0]] == logits[4, favourite[4, 0]] - 100
    (ours,), after = run(inputs)
    added = after[9] - counts
    assert added.sum() == 3 and all(added[row, ours[row]] == 1 for row in (1, 2, 3))


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("vocab", [33, 1300])
def test_only_what_the_mask_allows_is_sampled(random, vocab):
    """Also a single token, and the last of the vocabulary, against bias and truncation."""
    logits = torch.randn(5, vocab) * 3
    masks = {0: [7], 1: [vocab - 1], 2: list(range(0, vocab, 3)), 4: [31, 32]}
    options = dict(temperature=1.5, truncate=True, top_k={2: 5, 4: 1}, top_p={3: 0.8}) if random else {}
    inputs = make_inputs(logits, [0, 1, 2, 3, 4], num_rows=6, masks=masks, bias={0: {3: 90.0}, 3: {5: 90.0}}, **options)
    tokens = compare(inputs)
    assert tokens[0] == 7 and tokens[1] == vocab - 1 and tokens[2] % 3 == 0 and tokens[4] in (31, 32)
    assert tokens[3] == 5, "a row without a mask may be anything"


def test_drafts_are_counted_and_masked_and_only_what_holds_is_kept():
    """Row 3 verifies three drafts, row 0 one, row 5 none; right and wrong ones; each sample has its own mask."""
    vocab, rows = 120, [3, 3, 3, 3, 0, 0, 5, -1]
    logits = torch.randn(8, vocab) * 2
    logits[:, 100:] = -30.0  # no sample is one of these: what is drafted first is wrong
    logits[5] = logits[4]  # what is sampled twice is penalised the second time
    options = dict(temperature={3: 1.0, 0: 0.0, 5: 2.0}, seed=17)
    penalties = torch.tensor([[1.2, 0.5, 0.3]] * 6)
    penalties[5] = torch.tensor([1.0, 0.0, 0.0])
    positions = torch.tensor([9, 10, 11, 12, 4, 5, 7, 0])
    base = make_inputs(logits, rows, positions, 6, penalties=penalties, stop={}, **options)
    words = base[14].repeat(4, 1)
    words[[6 + 3, 18 + 3]] = torch.randint(-(2**31), 2**31 - 1, (2, words.shape[1]), dtype=torch.int32)  # of row 3
    base[14] = words
    tokens = torch.randint(100, vocab, (20,), dtype=torch.int32)
    logit_rows = torch.tensor([4, 5, 6, 7, 12, 13, 2, 0]).int()
    kept = []
    for _ in range(4):  # the next draft is put right, until all hold
        inputs = [*base, tokens.clone(), logit_rows]
        found = compare(inputs, every=False)
        (ours,), after = run(inputs)
        kept.append(int(after[9][3].sum()))
        assert after[15][3] == ours[kept[-1] - 1] and after[15][5] == ours[6]
        tokens[logit_rows[kept[-1] % 4]] = found[kept[-1] - 1]
        tokens[logit_rows[5]] = found[4]
    assert kept == [1, 2, 3, 4]
    assert after[9][0, found[4]] >= 1 and after[9][5].sum() == 0


def test_a_sample_of_a_tree_follows_its_ancestors_alone():
    """Row 2 verifies a tree, row 0 a chain, row 4 nothing; each node is put right in turn."""
    rng, vocab, num_rows = random.Random(torch.initial_seed()), 90, 5
    parents = random_parents(rng, DRAFTS)
    rows = [2] * (1 + DRAFTS) + [0] * 3 + [4, -1]
    logits = (torch.randn(len(rows), vocab) * 2)[[0] * len(rows)]  # the same: penalties alone tell samples apart
    depths = [0, *(len(path_to(parents, i)) for i in range(DRAFTS)), 0, 1, 2, 0, 0]
    penalties = torch.tensor([[1.5, 0.9, 0.4]] * num_rows)
    base = make_inputs(logits, rows, [9 + d for d in depths], num_rows, penalties=penalties, stop={})
    words = base[14].repeat(1 + DRAFTS, 1)
    words[2::num_rows] = torch.randint(-(2**31), 2**31 - 1, (1 + DRAFTS, words.shape[1]), dtype=torch.int32)
    base[14] = words
    seen = [-1, *(bits_of(parents, i, DRAFTS) for i in range(DRAFTS)), *[-1] * 5]
    order = torch.randperm(len(rows) + 7)[: len(rows)].int()  # rows of the step's tokens
    ancestors = torch.zeros(len(rows) + 7, dtype=torch.int32)
    ancestors[order] = torch.tensor(seen, dtype=torch.int32)
    tokens = torch.randint(vocab, (len(rows) + 7,), dtype=torch.int32)
    for node in range(DRAFTS):  # parents come first: with each the path to it is right
        inputs = [*base, tokens.clone(), order, ancestors]
        found = compare(inputs, every=False)
        tokens[order[1 + node]] = found[1 + parents[node]]
    inputs = [*base, tokens.clone(), order, ancestors]
    compare(inputs)
    (ours,), after = run(inputs)
    held = {-1} | {n for n in range(DRAFTS) if all(ours[1 + parents[i]] == tokens[order[1 + i]]
                                                   for i in path_to(parents, n))}  # fmt: skip
    assert len(held) > DRAFTS / 2 and int(after[9][2].sum()) == len(held)
    assert after[15].tolist() == [77, 77, 77, 77, ours[-2]], "the last token of who has drafts is the host's to say"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("best", [1, 20])
def test_logprobs_are_of_the_raw_logits(dtype, best):
    logits = (torch.randn(3, 2500).round(decimals=2) * 4).to(dtype)
    logits[0, 100:110] = logits[0].max()  # equals: the lowest id first
    inputs = make_inputs(logits, [1, -1, 0], num_rows=2, temperature={0: 1.0, 1: 3.0}, bias={0: {40: 9.0}}, stop={})
    compare(inputs, num_logprobs=best)


def test_one_row_is_spread_over_programs_and_many_rows_need_few():
    for rows, vocab, fewest in ((1, 128256, 100), (256, 262144, 8)):
        last = Tensor((rows,), "int32")
        inputs = (Tensor((rows, vocab), "bfloat16"), last, last, *(None,) * 12, last)
        off = dict(num_bias=0, num_stop=0, num_logprobs=0, random=False, truncate=False, extras=False)
        found = tactics_of("Sample")(Site("Sample", {"num_rows": rows} | off, inputs, (last,)))
        assert len({tactic.name for tactic in found}) == len(found)
        assert found[0].launches[0].grid[0] >= fewest


def test_the_reference_keeps_what_ties_with_the_last():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    one = torch.ones(1)
    off = dict(top_k=torch.tensor([0]), top_p=one, min_p=torch.zeros(1))
    assert kept(values, one, **off | dict(top_k=torch.tensor([2]))).tolist() == [[True, False, True, True, True, False]]
    assert kept(values, one, **off | dict(top_p=one * 0.5)).sum() == 4
    assert kept(values, one, **off | dict(min_p=one * 0.9)).sum() == 1
    assert kept(values, one * 0, **off | dict(top_k=torch.tensor([2]))).all()


def test_every_kernel_compiles_for_every_architecture():
    """In a process of its own: this one may interpret kernels instead of compiling them."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 40


def compile_every_kernel():
    """Prints how many cubins there are: all extras, with trees of drafts, and none, of 4 rows in bf16."""
    from ingot.builder.targets.cubin import CAPABILITIES, compile_all

    def make(shape, *dtypes):
        return tuple(Tensor(shape, dtype) for dtype in dtypes)

    rows, vocab, n = 4, 128256, 8
    step = (*make((rows, vocab), "bfloat16"), *make((rows,), "int32", "int32"))
    draw = make((n,), "float32", "int32", "float32", "float32", "int64")
    extras = (*make((n, 3), "float32"), *make((n, vocab), "int32"), *make((n, 300), "int32", "float32"),
              *make((n, 8), "int32"), *make((n,), "int32"), *make((n, vocab // 32), "int32"))  # fmt: skip
    last = make((n,), "int32")
    outputs = (*make((rows,), "int32", "float32", "int32"), *make((rows, 20), "int32", "float32"))
    off = dict(num_rows=n, num_bias=0, num_stop=0, num_logprobs=0, random=False, truncate=False, extras=False)
    random, truncate = off | {"random": True}, off | {"random": True, "truncate": True}
    everything = truncate | dict(extras=True, num_bias=300, num_stop=8, num_logprobs=20, drafts=16)
    none = (None,) * 7
    sites = [
        Site("Sample", off, (*step, *none[:5], *none, *last), outputs[:1]),
        Site("Sample", random, (*step, draw[0], *none[:3], draw[4], *none, *last), outputs[:1]),
        Site("Sample", truncate, (*step, *draw, *none, *last), outputs[:1]),
        Site("Sample", everything, (*step, *draw, *extras, *last, *make((rows,), *["int32"] * 3)), outputs),
    ]
    kernels = {launch.kernel for site in sites for t in tactics_of("Sample")(site)[:1] for launch in t.launches}
    count = 0
    for capability in CAPABILITIES:
        for kernel, cubin in compile_all(kernels, capability).items():
            assert getattr(cubin, "data", b"")[:4] == b"\x7fELF" and cubin.shared <= 99 << 10, (kernel, cubin)
            count += 1
    print(count, "cubins")


if __name__ == "__main__":
    compile_every_kernel()
