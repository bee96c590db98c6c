"""RotaryPagedAttention on the GPU: PagedAttention's tactics on what is rotated on the way.

In buckets for decoding its kernels rotate what they read. In others one launch rotates and writes K and V: the rotated
queries go to the workspace, rotated keys and the values straight to their slots; what attends is PagedAttention's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import triton
import triton.language as tl

from ..paged_attention.kernel import tactics as attentions
from ..paged_attention.launches import (
    ANCESTORS,
    SCALE_NAMES,
    VALUE,
    Rotation,
    copies,
    copy_constants,
    copy_pointer,
    scale_constants,
    stored_type,
)
from ..paged_attention.launches import TABLE as ROTATION_TABLE
from ..pdl import begin
from ..rope.kernel import rotated
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

BLOCK = 512
X, TABLE, SLOTS, K_PAGES, V_PAGES, K_SCALE, V_SCALE = 0, 1, 2, 6, 7, 9, 10


@triton.jit
def rotate_kernel(
    x, table, slots, query, k_pages, v_pages,
    WIDTH: tl.constexpr, Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tokens, column blocks): columns of one token, rotated, to where they belong."""
    begin(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    KEYS: tl.constexpr = Q_WIDTH + K_WIDTH
    value = rotated(x, table, token, column, WIDTH, KEYS, HEAD_DIM, ROTARY, OFFSET, INTERLEAVED)
    tl.store(query + token * Q_WIDTH + column, value, mask=column < Q_WIDTH)
    is_key, is_value = (column >= Q_WIDTH) & (column < KEYS), (column >= KEYS) & (column < WIDTH)
    tl.store(k_pages + slot * K_WIDTH + column - Q_WIDTH, value, mask=is_key)
    tl.store(v_pages + slot * (WIDTH - KEYS) + column - KEYS, value, mask=is_value)


def tactics(site: Site) -> list[Tactic]:
    """PagedAttention's, on packed rows that it rotates itself or on queries in the workspace."""
    tree = any(site.inputs[ANCESTORS - 1 :])  # one input earlier than in PagedAttention
    return _decoding(site) if site.max_query == 1 and not tree else _rotated_first(site)


def _decoding(site: Site) -> list[Tactic]:
    x, table, *step = site.inputs
    assert x is not None and table is not None
    a = site.attributes
    inner = replace(site, op="PagedAttention", inputs=(x, None, None, *step))
    rotation = Rotation(table.shape[1], a["rotary_offset"], bool(a["interleaved"]), table.dtype)

    def moved(operand: Operand) -> Operand:
        """The step is one input earlier than in PagedAttention, and the table behind x."""
        if operand.kind != "input" or operand.index <= VALUE:
            return operand
        return Operand("input", TABLE if operand.index == ROTATION_TABLE else operand.index - 1)

    return [_with(tactic, tactic.launches, moved) for tactic in attentions(inner, rotation)]


def _rotated_first(site: Site) -> list[Tactic]:
    """PagedAttention's tactics begin with its write, which the rotation replaces."""
    x, table, *step = site.inputs
    assert x is not None and table is not None
    a, tokens = site.attributes, x.shape[0]
    widths = (a["num_heads"] * a["head_dim"], a["num_kv_heads"] * a["head_dim"], a["num_kv_heads"] * a["v_head_dim"])
    parts = (Tensor((tokens, width), x.dtype) for width in widths)
    inner = replace(site, op="PagedAttention", inputs=(*parts, *step))
    size = -(-tokens * widths[0] * (4 if x.dtype == "float32" else 2) // 256) * 256

    def moved(operand: Operand) -> Operand:
        """PagedAttention's query is the start of the workspace; its keys and values are read from the pool alone."""
        if operand.kind == "workspace":
            return Operand("workspace", size + operand.index)
        if operand.kind != "input":
            return operand
        return Operand("workspace", 0) if operand.index <= VALUE else Operand("input", operand.index - 1)

    rotate = _rotate(site, inner, size)
    return [
        replace(found, launches=(rotate, *found.launches), workspace=size + tactic.workspace)
        for tactic in attentions(inner)
        for found in [_with(tactic, tactic.launches[1:], moved)]
    ]


def _with(tactic: Tactic, launches: Sequence[Launch], moved: Callable[[Operand], Operand]) -> Tactic:
    """The tactic of these launches, their operands moved."""
    return replace(tactic, launches=tuple(
        replace(each, arguments=tuple(moved(a) if isinstance(a, Operand) else a for a in each.arguments))
        for each in launches
    ))  # fmt: skip


def _rotate(site: Site, inner: Site, room: int) -> Launch:
    """inner: PagedAttention's site of what it writes, whose workspace begins behind `room` bytes of rotated queries."""
    x, table = site.inputs[:2]
    assert x is not None and table is not None
    a, (tokens, width) = site.attributes, x.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    constants = {
        "WIDTH": width, "Q_WIDTH": a["num_heads"] * a["head_dim"], "K_WIDTH": a["num_kv_heads"] * a["head_dim"],
        "HEAD_DIM": a["head_dim"], "ROTARY": table.shape[1], "OFFSET": a["rotary_offset"],
        "INTERLEAVED": bool(a["interleaved"]), "BLOCK": block,
    }  # fmt: skip
    quantised = stored_type(inner) != x.dtype
    if quantised:
        constants |= {"DV": a["v_head_dim"], **copy_constants(inner), **scale_constants(inner)}
    places = {name: Operand("workspace", room + place.index) for name, place in copies(inner)[0].items()}
    pointer, pages = POINTERS[x.dtype], POINTERS[stored_type(inner)]
    scales = SCALE_NAMES if quantised else ()
    signature = (
        ("x", pointer), ("table", POINTERS[table.dtype]), ("slots", "*i32"), ("query", pointer), ("k_pages", pages),
        ("v_pages", pages), *((name, copy_pointer(x.dtype)) for name in places), *((name, "*fp32") for name in scales),
    )  # fmt: skip
    function = "rounded:rotate_rounded_kernel" if quantised else "kernel:rotate_kernel"
    kernel = Kernel(
        f"rotary_paged_attention.{function}",
        signature,
        tuple(constants.items()),
        divisible=("x", "table", "query", "k_pages", "v_pages", *places),
    )
    inputs = (Operand("input", i) for i in (X, TABLE, SLOTS))
    pools, units = ([Operand("input", i) for i in pair] for pair in ((K_PAGES, V_PAGES), (K_SCALE, V_SCALE)))
    arguments = (*inputs, Operand("workspace", 0), *pools, *places.values(), *(units if quantised else ()))
    return Launch(kernel, (tokens, triton.cdiv(width, block), 1), arguments)
