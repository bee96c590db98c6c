"""Draft on the GPU: no host is asked between what the target samples and the last guess of the draft engine.

Site: op `Draft`; attributes `page_size`, `vocab_size` (of the draft engine), `step`: "first", "path" or "next". Inputs,
all int32:

    0 packed: the target's step (`plugins/unpack`), with the N requests to draft for behind it, [3, N]: their places in
      the step, the rows of logits of their first samples, how many samples they have; N is the header's fifth number,
      columns of `pages` its sixth
    1 tokens [T']    2 query_start [S'+1]    3 kv_len [S']    4 pages [S', width']    5 sampled [R'] of that step
    6 ancestors [T'] of that step, or of the longest, where drafts are chains: all ones
    7 last_token: the token that the draft engine guessed last for each of the N    8 level: its third number is C

Outputs: those of `Unpack`, for a step of N sequences: the first has two tokens each, the last one sampled and the one
before it; the next ones have the token guessed last, at the sample_positions and with the pages of the step before.
"path" stands in for "first" where drafts are or were trees, of which no keys are kept: C tokens each, from the one that
the first sample follows to the last one sampled, which fills up what is left. Both have ancestors [T], all ones, and
bases [S], how many positions are right then.
Tokens past the vocabulary become its last. What is past the page table goes to slot 0, as padding does.
"""

from typing import Any

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import Kernel, Launch, Operand, Site, Tactic

BLOCK = 256


@triton.jit
def slot_of(pages_at, position, columns, PAGE: tl.constexpr):
    """Where the key of a position is written, 0 past the page table."""
    page = position // PAGE
    return tl.load(pages_at + page, mask=page < columns, other=0) * PAGE + tl.where(page < columns, position % PAGE, 0)


@triton.jit
def wanted(packed):
    """Of a packed step: columns of its page table, requests to draft for, and where what is said of them begins."""
    t = tl.load(packed)
    s = tl.load(packed + 1)
    width = tl.load(packed + 2)
    n = tl.load(packed + 4)
    return width, n, packed + 8 + s + 1 + 3 * t + s + s * width + 3 * tl.load(packed + 3)


@triton.jit
def follows(sampled, tokens, ancestors, num, last, j):
    """Whether draft j of a request, of whose samples number `last` holds, says what was sampled there.

    What a token sees of the last `num` keys, the one in front of the drafts first, tells which of them it follows.
    """
    between = (tl.load(ancestors + j) >> (32 - num + last)) & ((1 << (j - last)) - 1)
    return (between == 1) & (tl.load(sampled + last) == tl.load(tokens + j))


@triton.jit
def follow(sampled, tokens, ancestors, num):
    """Of a request's `num` samples, and the tokens that they follow, the drafts behind the first: (the last sample that
    holds, how many drafts are before it)."""
    last = num * 0
    right = last
    for j in range(1, num):
        holds = follows(sampled, tokens, ancestors, num, last, j)
        last = tl.where(holds, j, last)
        right += holds.to(tl.int32)
    return last, right


@triton.jit
def copy_pages(pages, table, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The first `columns` of a row of the page table into one of WIDTH, zeros behind them."""
    i = tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        column = start + i
        page = tl.load(table + column, mask=column < columns, other=0)
        tl.store(pages + column, page, mask=column < columns)
    for start in range(columns, WIDTH, BLOCK):
        tl.store(pages + start + i, i * 0, mask=start + i < WIDTH)


@triton.jit
def first_kernel(
    packed, target_tokens, target_query_start, target_kv_len, target_pages, sampled, target_ancestors, level,
    tokens, positions, slots, query_start, kv_len, pages, logit_rows, sample_rows, sample_positions, ancestors, bases,
    T: tl.constexpr, S: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    V: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (S + blocks of the longest array): a program for each sequence, then padding. level: None but for "path"."""
    begin(PDL)
    width, n, ahead = wanted(packed)
    count = 2
    if level is not None:
        count = tl.load(level + 2)
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if program < S:
        if program < n:
            work = tl.load(ahead + program)
            row = tl.load(ahead + n + program)
            num = tl.load(ahead + 2 * n + program)
            first = tl.load(target_query_start + work + 1) - num  # the token that the first sample follows
            last, right = follow(sampled + row, target_tokens + first, target_ancestors + first, num)
            skipped = right  # drafts that hold and are not given again
            if level is not None:
                skipped = right * 0
            root = tl.load(target_kv_len + work) - num
            newest = tl.load(sampled + row + last)
            table = target_pages + work.to(tl.int64) * tl.load(packed + 5)
            columns = tl.minimum(width, WIDTH)
            copy_pages(pages + program.to(tl.int64) * WIDTH, table, columns, WIDTH, BLOCK)
            at = count * program
            for j in range(0, count):
                position = root + skipped + j
                tl.store(tokens + at + j, tl.minimum(newest, V - 1))
                tl.store(positions + at + j, tl.minimum(position, WIDTH * PAGE - 1))
                tl.store(slots + at + j, slot_of(table, position, columns, PAGE))
            tl.store(tokens + at, tl.minimum(tl.load(target_tokens + first), V - 1), mask=skipped == 0)
            held = num * 0
            depth = held
            for j in range(1, num):  # as `follow`, which does not tell the way
                holds = follows(sampled + row, target_tokens + first, target_ancestors + first, num, held, j)
                held = tl.where(holds, j, held)
                depth += holds.to(tl.int32)
                token = tl.load(target_tokens + first + held)
                place = depth - skipped
                tl.store(tokens + at + place, tl.minimum(token, V - 1), mask=(place >= 0) & (place < count))
            length = root + right + 2
            tl.store(kv_len + program, tl.minimum(root + skipped + count, WIDTH * PAGE))
            tl.store(logit_rows + program, at + right + 1 - skipped)
            tl.store(sample_rows + program, program)
            tl.store(sample_positions + program, length)
            tl.store(bases + program, length)
        else:
            tl.store(kv_len + program, 0)
        return
    i += (program - S) * BLOCK
    padding = (i >= count * n) & (i < T)
    tl.store(tokens + i, i * 0, mask=padding)
    tl.store(positions + i, i * 0, mask=padding)
    tl.store(slots + i, i * 0, mask=padding)
    tl.store(ancestors + i, i * 0 - 1, mask=i < T)
    tl.store(query_start + i, count * tl.minimum(i, n), mask=i <= S)
    rest = (i >= n) & (i < R)
    tl.store(logit_rows + i, i * 0, mask=rest)
    tl.store(sample_rows + i, i * 0 - 1, mask=rest)
    tl.store(sample_positions + i, i * 0, mask=rest)


@triton.jit
def one_token_each(
    j, n, position, slot, positions, slots, query_start, kv_len, logit_rows, sample_rows, sample_positions,
    S: tl.constexpr,
):  # fmt: skip
    """What a step of n sequences, padded to S, says of sequences j, each with the token at its position."""
    there = j < n
    inside = j < S
    tl.store(positions + j, position, mask=inside)
    tl.store(slots + j, slot, mask=inside)
    tl.store(query_start + j, tl.minimum(j, n), mask=j <= S)
    tl.store(kv_len + j, tl.where(there, position + 1, 0), mask=inside)
    tl.store(logit_rows + j, tl.where(there, j, 0), mask=inside)
    tl.store(sample_rows + j, tl.where(there, j, -1), mask=inside)
    tl.store(sample_positions + j, tl.where(there, position + 1, 0), mask=inside)


@triton.jit
def next_kernel(
    packed, last_token,
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
    token = tl.load(last_token + j, mask=there, other=0)
    tl.store(tokens + j, tl.minimum(token, V - 1), mask=inside)
    one_token_each(
        j, n, position, slot, positions, slots, query_start, kv_len, logit_rows, sample_rows, sample_positions, S
    )


def tactics(site: Site) -> list[Tactic]:
    """One launch."""
    num_tokens, (sequences, width), rows = site.outputs[0].shape[0], site.outputs[5].shape, site.outputs[6].shape[0]
    a = site.attributes
    constants: dict[str, Any] = {"T": num_tokens, "S": sequences, "R": rows, "WIDTH": width, "BLOCK": BLOCK,
                                 "PAGE": a["page_size"], "V": a["vocab_size"]}  # fmt: skip
    step = a["step"]
    function, given = (next_kernel, (0, 7)) if step == "next" else (first_kernel, (*range(7), 8))
    if step == "first":
        constants["level"], given = None, given[:-1]
    grid = triton.cdiv(sequences + 1, BLOCK)
    if step == "next":
        constants = {name: value for name, value in constants.items() if name not in ("T", "R")}
    else:
        grid = sequences + triton.cdiv(max(num_tokens, sequences + 1, rows), BLOCK)
    names = [name for name in function.arg_names if not name.isupper() and name not in constants]
    signature = tuple((name, "*i32") for name in names)
    kernel = Kernel(f"draft.kernel:{function.__name__}", signature, tuple(constants.items()))
    inputs = tuple(Operand("input", i) for i in given)
    outputs = tuple(Operand("output", i) for i in range(len(site.outputs)))
    return [Tactic("blocks", (Launch(kernel, (grid, 1, 1), (*inputs, *outputs)),))]
