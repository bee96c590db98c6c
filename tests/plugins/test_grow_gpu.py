"""Levels of trees as they are staged on the GPU, or interpreted, against what the host grows from the same numbers."""

import pytest
import torch

pytest.importorskip("triton")

from ingot.plugins import jit, tactics_of
from ingot.plugins.tactic import Site, Tensor
from ingot.runtime.speculation.tree import Growth
from triton_run import DEVICE, described

PAGE, WIDTH, VOCAB, DRAFT_VOCAB, LEVELS = 4, 9, 50, 40, 3
NAMES = ("tokens", "positions", "slots", "query_start", "kv_len", "pages", "logit_rows", "sample_rows",
         "sample_positions", "ancestors", "parents")  # fmt: skip


class Levels:
    """`num` requests that grow trees, `run` nodes of a level going on; what is handed on stays on the GPU."""

    def __init__(self, num, run, branches, mapped):
        self.num, self.run, self.branches = num, run, branches
        self.bases = torch.randint(1, WIDTH * PAGE - 1 - LEVELS * run, (num,)).int()
        self.pages = torch.randint(1, 99, (num + 2, WIDTH)).int()
        self.ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].int() if mapped else None
        tokens, rows = (num * run + 3,), (num * run + 2,)
        shapes = [tokens] * 3 + [(num + 3,), (num + 2,), (num + 2, WIDTH)] + [rows] * 3 + [tokens] * 2
        handed_on = (LEVELS + 1, num + 4, 8)
        self.outputs = [Tensor(shape, "int32") for shape in shapes]
        self.outputs += [Tensor(handed_on, "float32"), Tensor(handed_on, "int32")]
        self.state = [
            torch.full(handed_on, 2**30, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.int32)
        ]

    def said(self, rows):
        """Of so many nodes: the best tokens and, some of them equal, the logarithms of their chances."""
        tokens = torch.stack([torch.randperm(DRAFT_VOCAB)[: self.branches] for _ in range(rows)]).int()
        return tokens, (torch.randn(tokens.shape).abs() * -2).round(decimals=1).sort(descending=True).values

    def staged(self, number, said):
        """The step of level `number`, by name."""
        packed = torch.zeros(8).int()
        packed[4] = self.num
        inputs = [packed, torch.tensor([number, self.run, 0]).int(), *said, self.bases, self.ids]
        options = {"page_size": PAGE, "vocab_size": DRAFT_VOCAB, "branches": self.branches}
        (tactic,) = tactics_of("Grow")(Site("Grow", options, tuple(map(described, inputs)), tuple(self.outputs)))
        found = [torch.full(t.shape, 2**30, dtype=torch.int32, device=DEVICE) for t in self.outputs[:-2]]
        found[NAMES.index("pages")].copy_(self.pages)
        given = [None if x is None else x.to(DEVICE) for x in inputs]
        jit.launch(tactic, given, [*found, *self.state], torch.zeros(16, dtype=torch.uint8, device=DEVICE))
        return {name: x.cpu() for name, x in zip(NAMES, found, strict=True)}


@pytest.mark.parametrize("num, run, branches, mapped", [(1, 3, 8, True), (7, 8, 8, False), (290, 1, 5, True)])
def test_a_level_is_what_the_host_grows(num, run, branches, mapped):
    levels = Levels(num, run, branches, mapped)
    ids = levels.ids if mapped else torch.arange(DRAFT_VOCAB).int()
    growth, going, paths = None, None, [[[]]] * num  # numbers of nodes on the path to each that was run
    for number in range(1, LEVELS + 1):
        width, done = (1 if number == 1 else run), (number - 1) * run
        tokens, chances = levels.said(num * width)
        if growth is None:
            growth = Growth(ids[tokens.long()].numpy(), chances.numpy())
        else:
            growth.add(going, *(x.reshape(num, run, branches).numpy() for x in (ids[tokens.long()], chances)))
        going = growth.going_on(run)
        paths = [[[*before[at // branches], done + k] for k, at in enumerate(row)]
                 for before, row in zip(paths, going.tolist(), strict=True)]  # fmt: skip
        step = levels.staged(number, (tokens, chances))
        mine = {name: x[: num * run] for name, x in step.items()}
        assert mine["tokens"].tolist() == growth.tokens(going).reshape(-1).tolist()
        rows = torch.from_numpy(going // branches) + width * torch.arange(num)[:, None]
        assert mine["parents"].tolist() == rows.reshape(-1).tolist()
        assert torch.equal(mine["positions"], (levels.bases + number - 1).repeat_interleave(run))
        assert torch.equal(mine["sample_positions"], (levels.bases + number).repeat_interleave(run))
        keys = (levels.bases[:, None] + done + torch.arange(run)).long()
        slots = levels.pages[:num].gather(1, keys // PAGE) * PAGE + keys % PAGE
        assert mine["slots"].tolist() == slots.reshape(-1).tolist()
        assert step["kv_len"].tolist() == [*(levels.bases + done + run).tolist(), 0, 0]
        for name in ("logit_rows", "sample_rows"):
            assert mine[name].tolist() == [*range(num * run)]
        free = 32 - done - run
        seen = [sum(1 << b for b in range(32) if b < free or b - free in path) for row in paths for path in row]
        assert [bits % 2**32 for bits in mine["ancestors"].tolist()] == seen
        assert step["query_start"].tolist() == [*range(0, num * run + 1, run), num * run, num * run]
        assert torch.equal(step["pages"], levels.pages)
        rest = {name: x[num * run :].tolist() for name, x in step.items()}
        for name in ("tokens", "positions", "slots", "parents", "logit_rows", "sample_positions"):
            assert not any(rest[name])
        assert {*rest["ancestors"], *rest["sample_rows"]} == {-1}
