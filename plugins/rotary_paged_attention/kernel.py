"""RotaryPagedAttention on the GPU: PagedAttention's tactics, with one launch that rotates and writes K and V.

The rotated queries go to the workspace, rotated keys and the values straight to their slots; what attends is
PagedAttention's own.
"""

from dataclasses import replace

import triton
import triton.language as tl

from ..paged_attention.kernel import tactics as attentions
from ..paged_attention.write import zero
from ..pdl import begin
from ..rope.kernel import rotated
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

BLOCK = 512
X, TABLE, SLOTS, K_PAGES, V_PAGES = 0, 1, 2, 6, 7


@triton.jit
def rotate_kernel(
    x, table, slots, query, k_pages, v_pages, arrived, counters,
    WIDTH: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tokens, column blocks): columns of one token, rotated, to where they belong; zeroes the counters."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    KEYS: tl.constexpr = Q_WIDTH + K_WIDTH
    value = rotated(x, table, token, column, WIDTH, KEYS, HEAD_DIM, ROTARY, OFFSET, INTERLEAVED)
    tl.store(query + token * Q_WIDTH + column, value, mask=column < Q_WIDTH)
    tl.store(k_pages + slot * K_WIDTH + column - Q_WIDTH, value, mask=(column >= Q_WIDTH) & (column < KEYS))
    tl.store(v_pages + slot * (WIDTH - KEYS) + column - KEYS, value, mask=(column >= KEYS) & (column < WIDTH))
    if tl.program_id(1) == 0:
        zero(arrived, counters)


def tactics(site: Site) -> list[Tactic]:
    """PagedAttention's, on queries in the workspace; each begins with its write, which the rotation replaces."""
    x, table, *step = site.inputs
    assert x is not None and table is not None
    a = site.attributes
    tokens = x.shape[0]
    queries, keys, values = (
        Tensor((tokens, width), x.dtype)
        for width in (
            a["num_heads"] * a["head_dim"],
            a["num_kv_heads"] * a["head_dim"],
            a["num_kv_heads"] * a["v_head_dim"],
        )
    )
    inner = Site("PagedAttention", a, (queries, keys, values, *step), site.outputs, site.device, site.max_query)
    size = -(-tokens * queries.shape[1] * (4 if x.dtype == "float32" else 2) // 256) * 256

    def moved(operand: Operand | int | float) -> Operand | int | float:
        """PagedAttention's query is the start of the workspace; its step is one input earlier than there."""
        if not isinstance(operand, Operand) or operand.kind == "output":
            return operand
        if operand.kind == "workspace":
            return Operand("workspace", size + operand.index)
        return Operand("workspace", 0) if operand.index == 0 else Operand("input", operand.index - 1)

    found = []
    for tactic in attentions(inner):
        write, *rest = tactic.launches
        *_, zeroed, counters = (moved(argument) for argument in write.arguments)
        launches = [_rotate(site, zeroed, counters)]
        launches += [replace(each, arguments=tuple(moved(argument) for argument in each.arguments)) for each in rest]
        found.append(Tactic(tactic.name, tuple(launches), size + tactic.workspace))
    return found


def _rotate(site: Site, zeroed: Operand | int | float, counters: Operand | int | float) -> Launch:
    x, table = site.inputs[:2]
    assert x is not None and table is not None
    a, (tokens, width) = site.attributes, x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    constants = {
        "WIDTH": width, "Q_WIDTH": a["num_heads"] * a["head_dim"], "K_WIDTH": a["num_kv_heads"] * a["head_dim"],
        "HEAD_DIM": a["head_dim"], "ROTARY": table.shape[1], "OFFSET": a["rotary_offset"],
        "INTERLEAVED": bool(a["interleaved"]), "BLOCK": block,
    }  # fmt: skip
    pointer = POINTERS[x.dtype]
    signature = (
        ("x", pointer), ("table", POINTERS[table.dtype]), ("slots", "*i32"), ("query", pointer), ("k_pages", pointer),
        ("v_pages", pointer), ("arrived", "*i32"), ("counters", "i32"),
    )  # fmt: skip
    kernel = Kernel(
        "rotary_paged_attention.kernel:rotate_kernel",
        signature,
        tuple(constants.items()),
        divisible=("x", "table", "query", "k_pages", "v_pages"),
    )
    inputs = (Operand("input", i) for i in (X, TABLE, SLOTS))
    pools = (Operand("input", i) for i in (K_PAGES, V_PAGES))
    arguments = (*inputs, Operand("workspace", 0), *pools, zeroed, counters)
    return Launch(kernel, (tokens, triton.cdiv(width, block), 1), arguments)
