"""Grow on the GPU: of all that may follow the nodes of a level, the likeliest become the next level that is run.

Site: op `Grow`; attributes `page_size`, `vocab_size` (of the drafter), `branches` K (of a node, at most 8), `levels`.
Inputs:

    0 packed int32: as `Draft` has it, with N requests to draft for
    1 level int32: number of the level, from 1 on, and how many nodes of it are run, at most K
    2 top_ids int32 and 3 top_logprobs fp32 [.., K]: of the nodes of the level before, request by request; before the
      first there is one node each, the token that is known
    4 bases [N] int32: the position of the first level
    5 token_ids [V] int32: the target's token of each of the drafter's, where they differ

Outputs, int32 but for chances: those of `Unpack` with ancestors, for a step of N sequences, in which `pages` stays as
the step before left it; then

    parents [T]: for each token, the row of the step before that it follows
    chances [levels, S', 8] fp32 and paths [levels, S', 8]: of the nodes that are run, from one level to the next: the
      logarithm of the chance of the path to each, and a bit for each node on it

Nodes of a level lie behind those of the levels before, from the base on, and see the path to them alone.
"""

import triton
import triton.language as tl

from ...engines.sampling import MAX_BRANCHES
from ..draft.kernel import slot_of
from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic

BLOCK = 256
MOST = tl.constexpr(MAX_BRANCHES)  # nodes of a level that are run, and branches of each


@triton.jit
def grow_kernel(
    packed, level, top_ids, top_logprobs, bases, token_ids,
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions, ancestors, parents,
    chances, paths,
    T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, V: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (S + blocks of the longest array): a program for each sequence, then padding. ROOM: rows of chances."""
    begin(PDL)
    n = tl.load(packed + 4)
    number = tl.load(level)
    run = tl.load(level + 1)
    program = tl.program_id(0)
    if program < S:
        if program < n:
            done = (number - 1) * run
            num = tl.where(number == 1, 1, run)  # nodes that were run
            i = tl.arange(0, MOST * MOST)
            parent, branch = i // MOST, i % MOST
            there = (parent < num) & (branch < K)
            row = program * num + parent
            mine = ((number - 1) * ROOM + program) * MOST
            known = there & (number > 1)
            chance = tl.load(top_logprobs + row * K + branch, mask=there, other=float("-inf"))
            chance += tl.load(chances + mine + parent, mask=known, other=0.0)
            chance = tl.where(chance == chance, chance, float("-inf"))
            path = tl.load(paths + mine + parent, mask=known, other=0)
            # how many are likelier, or as likely and before it
            equal = chance[None, :] == chance[:, None]
            likelier = (chance[None, :] > chance[:, None]) | (equal & (i[None, :] < i[:, None]))
            rank = tl.sum((there[None, :] & likelier).to(tl.int32), 1)
            chosen = there & (rank < run)
            place = program * run + rank
            token = tl.load(top_ids + row * K + branch, mask=chosen, other=0)
            token = tl.minimum(tl.maximum(token, 0), V - 1)
            if token_ids is not None:
                token = tl.load(token_ids + token, mask=chosen, other=0)
            path |= 1 << (done + rank)
            free = 32 - done - run  # keys before the first level
            base = tl.load(bases + program)
            table = pages + program.to(tl.int64) * WIDTH
            slot = slot_of(table, base + done + rank, WIDTH, PAGE)
            tl.store(tokens + place, token, mask=chosen)
            tl.store(positions + place, tl.minimum(base + number - 1 + rank * 0, WIDTH * PAGE - 1), mask=chosen)
            tl.store(slots + place, slot, mask=chosen)
            tl.store(logit_rows + place, place, mask=chosen)
            tl.store(sample_rows + place, place, mask=chosen)
            tl.store(sample_positions + place, base + number + rank * 0, mask=chosen)
            tl.store(ancestors + place, (path << free) | ((1 << free) - 1), mask=chosen)
            tl.store(parents + place, row, mask=chosen)
            after = (number * ROOM + program) * MOST
            tl.store(chances + after + rank, chance, mask=chosen)
            tl.store(paths + after + rank, path, mask=chosen)
            tl.store(kv_len + program, tl.minimum(base + done + run, WIDTH * PAGE))
        else:
            tl.store(kv_len + program, 0)
        return
    i = (program - S) * BLOCK + tl.arange(0, BLOCK)
    padding = (i >= n * run) & (i < T)
    tl.store(tokens + i, i * 0, mask=padding)
    tl.store(positions + i, i * 0, mask=padding)
    tl.store(slots + i, i * 0, mask=padding)
    tl.store(ancestors + i, i * 0 - 1, mask=padding)
    tl.store(parents + i, i * 0, mask=padding)
    tl.store(query_start + i, run * tl.minimum(i, n), mask=i <= S)
    rest = (i >= n * run) & (i < R)
    tl.store(logit_rows + i, i * 0, mask=rest)
    tl.store(sample_rows + i, i * 0 - 1, mask=rest)
    tl.store(sample_positions + i, i * 0, mask=rest)


def tactics(site: Site) -> list[Tactic]:
    """One launch."""
    num_tokens, (sequences, width), rows = site.outputs[0].shape[0], site.outputs[5].shape, site.outputs[6].shape[0]
    a, chances = site.attributes, site.outputs[11]
    constants = {"T": num_tokens, "S": sequences, "R": rows, "WIDTH": width, "ROOM": chances.shape[1],
                 "K": a["branches"], "BLOCK": BLOCK, "PAGE": a["page_size"], "V": a["vocab_size"]}  # fmt: skip
    mapped = site.inputs[5] is not None
    names = [name for name in grow_kernel.arg_names if name != "PDL" and not name.isupper()]
    if not mapped:
        names.remove("token_ids")
        constants["token_ids"] = None
    floats = ("top_logprobs", "chances")
    signature = tuple((name, POINTERS["float32"] if name in floats else "*i32") for name in names)
    kernel = Kernel("grow.kernel:grow_kernel", signature, tuple(constants.items()))
    inputs = tuple(Operand("input", i) for i in range(5 + mapped))
    outputs = tuple(Operand("output", i) for i in range(len(site.outputs)))
    grid = sequences + triton.cdiv(max(num_tokens, sequences + 1, rows), BLOCK)
    return [Tactic("blocks", (Launch(kernel, (grid, 1, 1), (*inputs, *outputs)),))]
