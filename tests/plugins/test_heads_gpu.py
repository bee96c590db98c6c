"""What heads have beside a draft engine's kernels, on the GPU or interpreted, against plain references."""

import random

import pytest
import torch

pytest.importorskip("triton")

from ingot.plugins import draft, jit, tactics_of
from ingot.plugins.draft_head import first_step, next_step
from ingot.plugins.rows import keep_states, move_rows, read_states
from ingot.plugins.tactic import Site, Tensor
from random_tree import bits_of, path_to, random_parents
from triton_run import DEVICE, described, run_tactic

PAGE, WIDTH, VOCAB, DRAFT_VOCAB = 4, 9, 50, 20


@pytest.fixture
def rng():
    return random.Random(torch.initial_seed())


def run(op, inputs, outputs, **attributes):
    """What the op's only tactic makes of these inputs; outputs: `Tensor` each."""
    (tactic,) = tactics_of(op)(Site(op, attributes, tuple(map(described, inputs)), tuple(outputs)))
    return [y.cpu() for y in run_tactic(tactic, [x.to(DEVICE) for x in inputs], outputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_matrices_lie_side_by_side(rng, dtype):
    for widths in ([48, 16], [7, 1030, 1, 64], [5]):
        parts = [(torch.randn(6, width) * 99).to(dtype) for width in widths]
        (y,) = run("Concat", parts, [Tensor((6, sum(widths)), str(dtype)[6:])], axis=rng.choice((1, -1)))
        assert torch.equal(y, torch.cat(parts, -1))
    one = Tensor((6, 4), "float32")
    for other, axis in ((Tensor((6, 4), "bfloat16"), 1), (one, 0)):
        site = Site("Concat", {"axis": axis}, (one, other), (Tensor((6, 8), "float32"),))
        assert tactics_of("Concat")(site) == [], "other types, another axis"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, num", [(33, 2), (1200, 3)])
def test_states_come_back_from_where_they_are_kept(rng, dtype, width, num):
    slots = torch.randperm(40)[:11].int()
    pools = [torch.full((40, width), torch.nan, dtype=dtype) for _ in range(num)]
    for pool in pools:
        states, expected = torch.randn(11, width).to(dtype), pool.clone()
        keep_states(states, slots, expected)
        (found,) = run("KeepStates", [states, slots], [Tensor((40, width), str(dtype)[6:])])
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        pool.copy_(expected)
    again = slots[torch.randperm(11)[:7]]
    (read,) = run("ReadStates", [again, *pools], [Tensor((7, num * width), str(dtype)[6:])])
    assert torch.equal(read, read_states(again, pools)) and not read.isnan().any()


@pytest.mark.parametrize("dtype, shape", [(torch.float32, (40, 33)), (torch.bfloat16, (8, 5, 3, 800))])
def test_rows_move(rng, dtype, shape):
    pool, slots = torch.randn(shape).to(dtype), torch.randperm(40)[:14].int().view(7, 2)
    slots[rng.randrange(7)] = -1
    expected = pool.clone()
    move_rows(expected, slots)
    assert not torch.equal(expected, pool)
    inputs, tensor = [pool.to(DEVICE), slots.to(DEVICE)], described(pool)
    (tactic,) = tactics_of("MoveRows")(Site("MoveRows", {}, tuple(map(described, inputs)), (tensor,)))
    jit.launch(tactic, inputs, inputs[:1], torch.zeros(16, dtype=torch.uint8, device=DEVICE))
    assert torch.equal(inputs[0].cpu(), expected)


class Steps:
    """A step of the target as it lies on the GPU, and the head's step tensors, from one step to the next.

    Drafts of the requests are chains and trees, of which some path is what was sampled.
    """

    def __init__(self, rng, num_works, num_ahead, guesses):
        self.rng, self.guesses = rng, guesses
        works, starts, row = [], [0], 0
        for _ in range(num_works):
            num_samples = rng.choice((1, 1, 2, 3, 6))
            share = [rng.randrange(VOCAB) for _ in range(num_samples + rng.choice((0, 0, 5)))]
            parents = random_parents(rng, num_samples - 1) if rng.random() < 0.6 else [*range(-1, num_samples - 2)]
            kv_len = len(share) + rng.randrange(WIDTH * PAGE - len(share) - 3)
            works.append((share, kv_len, row, num_samples, parents))
            starts.append(starts[-1] + len(share))
            row += num_samples
        self.works, self.ahead = works, rng.sample(range(num_works), num_ahead)
        self.table = torch.tensor([rng.sample(range(1, 99), WIDTH) for _ in works])
        sampled, seen = [], []
        for share, _, _, num, parents in works:
            drafts, mine = share[len(share) - num + 1 :], [rng.randrange(VOCAB) for _ in range(num)]
            for node in path_to(parents, rng.randrange(-1, num - 1)):
                mine[parents[node] + 1] = drafts[node]
            sampled += mine
            chain = parents == [*range(-1, num - 2)]
            seen += [-1] * (len(share) - num + 1)
            seen += [-1 if chain else bits_of(parents, i, num - 1) for i in range(num - 1)]
        tokens = [token for share, *_ in works for token in share]
        width = rng.choice((WIDTH, WIDTH - 1))
        header = [len(tokens), num_works, width, row, num_ahead, WIDTH, 0, 0]
        between = [0] * (num_works + 1 + 3 * len(tokens) + num_works + num_works * width + 3 * row)
        ahead = [*self.ahead, *(works[i][2] for i in self.ahead), *(works[i][3] for i in self.ahead)]
        ints = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
        self.sampled, self.width = sampled, width
        self.inputs = [ints(header + between + ahead), ints(starts), ints([length for _, length, *_ in works]),
                       self.table.int(), ints(sampled), ints(tokens), ints(seen)]  # fmt: skip
        self.ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].int()

    def told(self, i):
        """What the reference is told of the target's work."""
        share, kv_len, row, num, parents = self.works[i]
        return share, kv_len, self.sampled[row : row + num], parents

    def site(self, first, buckets, before=None):
        """The outputs of a step; `before`: those of the step before, which a next step goes on from."""
        tokens, sequences, rows = buckets
        last = torch.tensor([self.rng.randrange(DRAFT_VOCAB) for _ in range(max(1, len(self.ahead)))]).int()
        outputs = [Tensor(shape, "int32") for shape in ((tokens,), (tokens,), (tokens,), (sequences + 1,), (sequences,),
                   (sequences, WIDTH), (rows,), (rows * self.guesses,), (rows * self.guesses,),
                   *([(tokens,), (tokens,), (sequences,)] if first else []))]  # fmt: skip
        inputs = [*self.inputs, last, self.ids]
        attributes = {"page_size": PAGE, "guesses": self.guesses, "first": first}
        site = Site("DraftHead", attributes, tuple(map(described, inputs)), tuple(outputs))
        (tactic,) = tactics_of("DraftHead")(site)
        if before is None:
            return last, [y.cpu() for y in run_tactic(tactic, [x.to(DEVICE) for x in inputs], outputs)]
        results = [torch.full(y.shape, 2**30, dtype=torch.int32, device=DEVICE) for y in outputs]
        for i in (5, 8):  # pages and lengths stay where they are
            flat, given = results[i].view(-1), before[i].view(-1)
            flat[: min(len(flat), len(given))] = given[: len(flat)].to(DEVICE)
        jit.launch(tactic, [x.to(DEVICE) for x in inputs], results, torch.zeros(16, dtype=torch.uint8, device=DEVICE))
        return last, [y.cpu() for y in results]

    def slot(self, work, position, beyond=None):
        """Past the page table it is 0, or anywhere in page `beyond`."""
        page = position // PAGE
        if page >= self.width and beyond is None:
            return 0
        return (int(self.table[work, page]) if page < self.width else beyond) * PAGE + position % PAGE


@pytest.mark.parametrize("guesses", [1, 3])
@pytest.mark.parametrize("num_works, num_ahead", [(1, 1), (7, 4), (5, 0), (300, 290)])
def test_steps_of_a_head(rng, num_works, num_ahead, guesses):
    """The first takes all samples of the works to draft for, each next one the guess made last."""
    steps = Steps(rng, num_works, num_ahead, guesses)
    shares = [first_step(*steps.told(i)) for i in steps.ahead]
    num_tokens = sum(len(share.tokens) for share in shares)
    sequences = num_ahead + rng.randrange(3) + (not num_ahead)
    _, first = steps.site(True, (num_tokens + rng.randrange(9) + 1, sequences, max(1, num_tokens)))
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions, *rest = first
    seen, states, bases = rest
    assert (seen == -1).all()
    begin = 0
    for j, (work, share) in enumerate(zip(steps.ahead, shares, strict=True)):
        end = begin + len(share.tokens)
        assert query_start[j : j + 2].tolist() == [begin, end] and kv_len[j] == share.kv_len
        assert tokens[begin:end].tolist() == share.tokens and positions[begin:end].tolist() == share.positions
        assert slots[begin:end].tolist() == [steps.slot(work, position) for position in share.positions]
        known = steps.table[work] * (torch.arange(WIDTH) < steps.width)
        assert torch.equal(pages[j], known.int()) and logit_rows[j] == begin + share.row
        assert sample_positions[j * guesses : (j + 1) * guesses].tolist() == [share.length] * guesses
        assert states[begin:end].tolist() == [steps.slot(work, at) for at in share.states] and bases[j] == share.length
        begin = end
    assert not states[begin:].any()
    assert query_start[num_ahead:].tolist() == [begin] * (sequences + 1 - num_ahead)
    assert not kv_len[num_ahead:].any() and not slots[begin:].any() and not logit_rows[num_ahead:].any()
    assert (
        not tokens[begin:].any() and not positions[begin:].any() and not sample_positions[num_ahead * guesses :].any()
    )
    some = torch.arange(len(sample_rows))
    assert torch.equal(sample_rows, torch.where(some < num_ahead * guesses, some, -1).int())
    if guesses > 1:
        return
    before, lengths = first, [share.length for share in shares]
    for _ in range(2):
        sequences = num_ahead + rng.randrange(4) + (not num_ahead)
        last, found = steps.site(False, (sequences,) * 3, before)
        for j, work in enumerate(steps.ahead):
            share = next_step(int(last[j]), lengths[j], steps.ids.tolist())
            assert (int(found[0][j]), int(found[1][j]), int(found[4][j])) == (
                *share.tokens,
                *share.positions,
                share.kv_len,
            )
            assert found[2][j] == steps.slot(work, lengths[j], 0) and found[8][j] == share.length
            lengths[j] = share.length
        counts = torch.arange(sequences + 1).clamp(max=num_ahead).int()
        assert torch.equal(found[3], counts) and torch.equal(found[6][:num_ahead], counts[:num_ahead])
        assert found[7].tolist() == [*range(num_ahead), *[-1] * (sequences - num_ahead)]
        assert not any(found[i][num_ahead:].any() for i in (0, 1, 2, 4, 6, 8))
        before = found


@pytest.mark.parametrize("num_works, num_ahead", [(1, 1), (7, 4), (5, 0), (300, 290)])
def test_first_step_of_a_draft_engine(rng, num_works, num_ahead):
    """The last token that holds, and the one that was sampled behind it."""
    steps = Steps(rng, num_works, num_ahead, 1)
    sequences, vocab = num_ahead + rng.randrange(3) + (not num_ahead), VOCAB - 5
    shapes = [(2 * sequences,)] * 3 + [(sequences + 1,), (sequences,), (sequences, WIDTH)] + [(sequences,)] * 3
    shapes += [shapes[0], (sequences,)]
    packed, starts, kv_len, pages, sampled, tokens, seen = steps.inputs
    inputs = [packed, tokens, starts, kv_len, pages, sampled, seen, torch.zeros(1).int(), torch.zeros(3).int()]
    options = {"page_size": PAGE, "vocab_size": vocab, "step": "first"}
    outputs = run("Draft", inputs, [Tensor(shape, "int32") for shape in shapes], **options)
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions, *rest = outputs
    seen, bases = rest
    assert (seen == -1).all() and torch.equal(bases[:num_ahead], sample_positions[:num_ahead])
    for j, work in enumerate(steps.ahead):
        share = draft.first_step(*steps.told(work))
        assert tokens[2 * j : 2 * j + 2].tolist() == [min(token, vocab - 1) for token in share.tokens]
        assert positions[2 * j : 2 * j + 2].tolist() == share.positions and kv_len[j] == share.kv_len
        assert slots[2 * j : 2 * j + 2].tolist() == [steps.slot(work, position) for position in share.positions]
        assert torch.equal(pages[j], (steps.table[work] * (torch.arange(WIDTH) < steps.width)).int())
        assert logit_rows[j] == 2 * j + 1 and sample_positions[j] == share.kv_len
    some = torch.arange(sequences + 1)
    assert torch.equal(query_start, 2 * some.clamp(max=num_ahead).int())
    assert torch.equal(sample_rows, torch.where(some < num_ahead, some, -1)[:-1].int())
    assert not any(x[num_ahead:].any() for x in (kv_len, logit_rows, sample_positions))
    assert not any(x[2 * num_ahead :].any() for x in (tokens, positions, slots))
    last = torch.randint(VOCAB, (max(1, num_ahead),)).int()
    inputs = [x.to(DEVICE) for x in [*inputs[:7], last, inputs[8]]]
    found = [x.clone().to(DEVICE) for x in outputs[:-2]]
    poison = [0, 1, 2, 3, 4, 6, 7]  # pages and lengths stay where they are
    for i in poison:
        found[i] = torch.full((sequences + (i == 3),), 2**30, dtype=torch.int32, device=DEVICE)
    site = Site("Draft", options | {"step": "next"}, tuple(map(described, inputs)), tuple(map(described, found)))
    (tactic,) = tactics_of("Draft")(site)
    jit.launch(tactic, inputs, found, torch.zeros(16, dtype=torch.uint8, device=DEVICE))
    found = [x.cpu() for x in found]
    for j, work in enumerate(steps.ahead):
        share = draft.next_step(min(int(last[j]), vocab - 1), int(sample_positions[j]))
        assert [int(found[i][j]) for i in (0, 1, 4)] == [*share.tokens, *share.positions, share.kv_len]
        assert found[2][j] == steps.slot(work, share.positions[0], 0) and found[8][j] == share.kv_len
    assert torch.equal(found[3], some.clamp(max=num_ahead).int())
    assert found[7].tolist() == [*range(num_ahead), *[-1] * (sequences - num_ahead)]
    assert not any(found[i][num_ahead:].any() for i in (0, 1, 2, 4, 6, 8))


@pytest.mark.parametrize("num_works, num_ahead", [(1, 1), (7, 4), (5, 0), (300, 290)])
def test_first_step_of_trees(rng, num_works, num_ahead):
    """A draft engine is given the whole path that holds, since it kept no keys of it."""
    steps = Steps(rng, num_works, num_ahead, 1)
    sequences, count = num_ahead + rng.randrange(3) + (not num_ahead), 7
    num_tokens = count * sequences + rng.randrange(9)
    shapes = [(num_tokens,)] * 3 + [(sequences + 1,), (sequences,), (sequences, WIDTH)] + [(num_tokens,)] * 4
    packed, starts, kv_len, pages, sampled, tokens, seen = steps.inputs
    level = torch.tensor([0, 99, count]).int()
    inputs = [packed, tokens, starts, kv_len, pages, sampled, seen, torch.zeros(1).int(), level]
    outputs = run("Draft", inputs, [Tensor(shape, "int32") for shape in [*shapes, (sequences,)]], page_size=PAGE,
                  vocab_size=VOCAB, step="path")  # fmt: skip
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions, *rest = outputs
    seen, bases = rest
    for j, work in enumerate(steps.ahead):
        share, row = draft.path_step(*steps.told(work), count)
        mine = slice(count * j, count * (j + 1))
        assert tokens[mine].tolist() == share.tokens
        assert positions[mine].tolist() == [min(at, WIDTH * PAGE - 1) for at in share.positions]
        assert slots[mine].tolist() == [steps.slot(work, position) for position in share.positions]
        assert torch.equal(pages[j], (steps.table[work] * (torch.arange(WIDTH) < steps.width)).int())
        assert kv_len[j] == min(share.kv_len, WIDTH * PAGE) and logit_rows[j] == count * j + row
        assert sample_rows[j] == j and sample_positions[j] == bases[j] == share.positions[row] + 1
    assert torch.equal(query_start, count * torch.arange(sequences + 1).clamp(max=num_ahead).int())
    assert (sample_rows[num_ahead:] == -1).all() and (seen == -1).all()
    assert not any(x[num_ahead:].any() for x in (kv_len, logit_rows, sample_positions))
    assert not any(x[count * num_ahead :].any() for x in (tokens, positions, slots))
