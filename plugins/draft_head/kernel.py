"""DraftHead on the GPU: no host is asked between what the target samples and the last guess of the head.

Site: op `DraftHead`; attributes `page_size`, `guesses` (that a row of logits makes at once: 1, or as many as Medusa has
heads), `first`. Inputs, all int32:

    0 packed: as `Draft` has it    1 query_start [S'+1]    2 kv_len [S']    3 pages [S', width']    4 sampled [R']
    5 target_tokens and 6 ancestors [T'], all of the target's step    7 last_token: the guess made last for each of the
      N requests to draft for    8 token_ids [V]: the target's token of each guess

Outputs: those of `Unpack`, for a step of N sequences, the last two with a place for each guess of a row. The first step
takes the samples of a request that hold, shifted by one position (`reference.py`), as many tokens as it has samples in
all; sample_positions is then what is right of it, where the next one, which has the guess made last, goes on. What is
past the page table goes to slot 0, as padding does. The first has three outputs more:

    ancestors [T], all ones    state_slots [T]: where the target left the states that each token goes on from
    bases [S]: as sample_positions
"""

import triton
import triton.language as tl

from ..draft.kernel import copy_pages, follows, one_token_each, slot_of, wanted
from ..pdl import begin
from ..tactic import Kernel, Launch, Operand, Site, Tactic

BLOCK = 256


@triton.jit
def first_kernel(
    packed, target_query_start, target_kv_len, target_pages, sampled, target_tokens, target_ancestors,
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions, ancestors,
    state_slots, bases,
    T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, GUESSES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (S + blocks of the longest array): a program for each sequence, then padding."""
    begin(PDL)
    width, n, ahead = wanted(packed)
    nums = ahead + 2 * n
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = i * 0  # samples of the requests before this one; of all of them where there is none
    for start in range(0, tl.minimum(program, n), BLOCK):
        before += tl.load(nums + start + i, mask=start + i < tl.minimum(program, n), other=0)
    first = tl.sum(before, 0)
    if program < S:
        tl.store(query_start + program, first)
        if program < n:
            work = tl.load(ahead + program)
            row = tl.load(ahead + n + program)
            num = tl.load(nums + program)
            at = tl.load(target_query_start + work + 1) - num  # the token that the first sample follows
            length = tl.load(target_kv_len + work)
            table = target_pages + work.to(tl.int64) * tl.load(packed + 5)
            columns = tl.minimum(width, WIDTH)
            root = length - num
            for j in range(0, num):
                tl.store(tokens + first + j, tl.load(sampled + row))
                tl.store(positions + first + j, root + j)
                slot = slot_of(table, root + j, columns, PAGE)
                tl.store(slots + first + j, slot)
                tl.store(state_slots + first + j, slot)
            last = num * 0
            right = last
            for j in range(1, num):  # as `follow`, which does not tell the way
                holds = follows(sampled + row, target_tokens + at, target_ancestors + at, num, last, j)
                last = tl.where(holds, j, last)
                right += holds.to(tl.int32)
                tl.store(tokens + first + right, tl.load(sampled + row + last))
                tl.store(state_slots + first + right, slot_of(table, root + last, columns, PAGE))
            tl.store(bases + program, root + right + 1)
            copy_pages(pages + program.to(tl.int64) * WIDTH, table, columns, WIDTH, BLOCK)
            tl.store(kv_len + program, length)
            tl.store(logit_rows + program, first + right)
            for guess in range(0, GUESSES):
                tl.store(sample_positions + program * GUESSES + guess, root + right + 1)
        else:
            tl.store(kv_len + program, 0)
        return
    i += (program - S) * BLOCK
    padding = (i >= first) & (i < T)
    tl.store(tokens + i, i * 0, mask=padding)
    tl.store(positions + i, i * 0, mask=padding)
    tl.store(slots + i, i * 0, mask=padding)
    tl.store(state_slots + i, i * 0, mask=padding)
    tl.store(ancestors + i, i * 0 - 1, mask=i < T)
    tl.store(query_start + i, i * 0 + first, mask=i == S)
    tl.store(logit_rows + i, i * 0, mask=(i >= n) & (i < R))
    tl.store(sample_rows + i, tl.where(i < n * GUESSES, i, -1), mask=i < R * GUESSES)
    tl.store(sample_positions + i, i * 0, mask=(i >= n * GUESSES) & (i < R * GUESSES))


@triton.jit
def next_kernel(
    packed, last_token, token_ids,
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions,
    S: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, V: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (blocks of S + 1). A bucket for decoding: S sequences, tokens and rows."""
    begin(PDL)
    n = tl.load(packed + 4)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = j < n
    inside = j < S
    position = tl.load(sample_positions + j, mask=there, other=0)
    position = tl.minimum(position, WIDTH * PAGE - 1)  # a guess past the longest context is no guess
    slot = slot_of(pages + j.to(tl.int64) * WIDTH, position, tl.where(there, WIDTH, 0), PAGE)
    guess = tl.load(last_token + j, mask=there, other=0)
    guess = tl.minimum(tl.maximum(guess, 0), V - 1)
    tl.store(tokens + j, tl.load(token_ids + guess, mask=there, other=0), mask=inside)
    one_token_each(
        j, n, position, slot, positions, slots, query_start, kv_len, logit_rows, sample_rows, sample_positions, S
    )


def tactics(site: Site) -> list[Tactic]:
    """One launch."""
    num_tokens, (sequences, width), rows = site.outputs[0].shape[0], site.outputs[5].shape, site.outputs[6].shape[0]
    guesses, vocab = site.attributes["guesses"], site.inputs[8]
    assert vocab is not None
    constants = {"T": num_tokens, "S": sequences, "R": rows, "GUESSES": guesses, "WIDTH": width, "BLOCK": BLOCK,
                 "PAGE": site.attributes["page_size"], "V": vocab.shape[0]}  # fmt: skip
    outputs = tuple(Operand("output", i) for i in range(len(site.outputs)))
    if site.attributes["first"]:
        function, inputs = first_kernel, tuple(Operand("input", i) for i in range(7))
        grid = sequences + triton.cdiv(max(num_tokens, sequences + 1, rows * guesses), BLOCK)
    else:
        function, inputs = next_kernel, (Operand("input", 0), Operand("input", 7), Operand("input", 8))
        grid = triton.cdiv(sequences + 1, BLOCK)
    names = [name for name in function.arg_names if name != "PDL"]
    plain = [name for name in names if not name.isupper()]
    signature = tuple((name, "*i32") for name in plain)
    kernel = Kernel(
        f"draft_head.kernel:{function.__name__}", signature, tuple((n, constants[n]) for n in names if n.isupper())
    )
    return [Tactic("blocks", (Launch(kernel, (grid, 1, 1), (*inputs, *outputs)),))]
