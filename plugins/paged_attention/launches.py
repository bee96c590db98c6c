"""The launches of PagedAttention's kernels for one site: sizes, arguments, and what lies where in the workspace.

Pages of 8 bits have scales, which kernels take behind all other pointers; those of plain pages are compiled without.
"""

import math
from dataclasses import dataclass
from typing import Any

import triton

from ...engines.dtypes import DTYPES
from ..tactic import POINTERS, Kernel, Launch, Operand, Site
from .attend import WARPGROUP_ROWS

QUERY, KEY, VALUE, SLOTS, QUERY_START, KV_LEN, PAGES, K_PAGES, V_PAGES, SINKS, K_SCALE, V_SCALE, ANCESTORS = range(13)
TABLE = 13  # of a rotation, which is not PagedAttention's own input
# of decode kernels
STEP_INPUTS = (QUERY, KEY, VALUE, TABLE, SLOTS, QUERY_START, KV_LEN, PAGES, K_PAGES, V_PAGES, SINKS)
STEP_NAMES = (
    "query",
    "key",
    "value",
    "table",
    "slots",
    "query_start",
    "kv_len",
    "pages",
    "k_pages",
    "v_pages",
    "sinks",
)
COPIES = "own_k", "own_v"  # of kernels that write, or attend prompts, in front of the scales
SCALE_NAMES = ("k_scale", "v_scale")  # of all kernels, behind their other pointers
AHEAD = 256  # keys of a sequence that `short.py` asks for in advance
TREES = ("chunk:", "decode:")  # kernels that take `ancestors`, the last of all
FP8_FROM = 89  # compute capability that converts fp8
# Columns of a head. With fewer, and pages of 8 bits, ptxas 12.8 loses the address of a matrix operand: the uniform
# register that it follows from is never set (`builder/targets/sass.py`). So warpgroups do not multiply there.
LEAST_COLUMNS = 64


@dataclass(frozen=True)
class Rotation:
    """Rope of queries and keys on their way: columns turned of a head, their offset, and the type of the table."""

    rotary: int
    offset: int
    interleaved: bool
    table: str


def shared_memory(capability: int) -> int:
    """Bytes of shared memory that a program may have: CUDA C++ Programming Guide, compute capabilities."""
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(capability, 99) << 10


def block(size: int) -> int:
    """The next power of two, at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Shape:
    """The sizes of a site, and launches made from them."""

    site: Site
    tokens: int
    sequences: int
    width: int  # of the page table
    page: int
    heads: int
    kv_heads: int
    d: int
    dv: int
    dtype: str
    itemsize: int
    stored: str  # element type of the pages
    rotation: Rotation | None

    @classmethod
    def of(cls, site: Site, rotation: Rotation | None) -> "Shape":
        query, pages, k_pages = site.inputs[QUERY], site.inputs[PAGES], site.inputs[K_PAGES]
        assert query is not None and pages is not None and k_pages is not None
        a, (sequences, width) = site.attributes, pages.shape
        return cls(
            site, query.shape[0], sequences, width, k_pages.shape[1], a["num_heads"], a["num_kv_heads"], a["head_dim"],
            a["v_head_dim"], query.dtype, 4 if query.dtype == "float32" else 2,
            stored_type(site), rotation,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def bg(self) -> int:
        return triton.next_power_of_2(self.group)

    @property
    def decode_rows(self) -> int:
        return block(self.group)

    @property
    def packed(self) -> bool:
        return self.site.inputs[KEY] is None

    @property
    def reach(self) -> int:
        """Most keys that a query can see."""
        bounds = self.site.attributes["window"], self.site.max_context
        return int(min(self.width * self.page, *(bound or math.inf for bound in bounds)))

    def fits(self, rows: int, bn: int, warps: int, stages: int) -> bool:
        """Whether the operands of a program fit its shared memory, and its accumulator the registers."""
        if self.quantised and rows >= WARPGROUP_ROWS.value and min(self.d, self.dv) < LEAST_COLUMNS:
            return False
        bd, bdv = block(self.d), block(self.dv)
        needed = rows * max(bd, bn) * self.itemsize + stages * bn * (bd + bdv) * DTYPES[self.stored].itemsize
        if self.quantised:  # a block of keys and values that are converted, or stages of those of the step
            needed += bn * (bd + bdv) * self.itemsize
            if copies(self.site)[0]:
                needed = max(needed, rows * max(bd, bn) * self.itemsize + stages * bn * (bd + bdv) * self.itemsize)
        return needed <= shared_memory(self.site.device.capability) and rows * bdv <= 128 * 32 * warps

    @property
    def tree(self) -> bool:
        """Whether drafts may be a tree."""
        return any(self.site.inputs[ANCESTORS:])

    @property
    def quantised(self) -> bool:
        return self.stored != self.dtype

    def constants(self) -> dict[str, Any]:
        a = self.site.attributes
        return {
            "STRIDE": self.strides()["STRIDE"], "WIDTH": self.width, "NUM_HEADS": self.heads,
            "NUM_KV_HEADS": self.kv_heads, "D": self.d, "DV": self.dv, "BD": block(self.d), "BDV": block(self.dv),
            "PAGE": self.page, "SCALE": a["scale"], "SOFTCAP": a["softcap"], "WINDOW": a["window"],
            "SINKS": self.site.inputs[SINKS] is not None, **scale_constants(self.site),
        }  # fmt: skip

    def strides(self) -> dict[str, int]:
        """Where queries, keys and values lie."""
        row, k_width, v_width = self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.dv
        if self.packed:
            total = row + k_width + v_width
            return {"STRIDE": total, "KEY_AT": row, "KEY_STRIDE": total, "VALUE_AT": row + k_width,
                    "VALUE_STRIDE": total}  # fmt: skip
        return {"STRIDE": row, "KEY_AT": 0, "KEY_STRIDE": k_width, "VALUE_AT": 0, "VALUE_STRIDE": v_width}

    def own_constants(self) -> dict[str, Any]:
        """Of `own.py`."""
        turned = (self.heads + self.kv_heads) * self.d
        r = self.rotation or Rotation(0, 0, False, self.dtype)
        return {**self.strides(), "TURNED": turned, "ROTARY": r.rotary, "OFFSET": r.offset,
                "INTERLEAVED": r.interleaved}  # fmt: skip

    def signature(self, *names: str) -> tuple[tuple[str, str], ...]:
        types = {"slots": "*i32", "query_start": "*i32", "kv_len": "*i32", "pages": "*i32", "arrived": "*i32"}
        types |= {"parts": "*fp32", "tops": "*fp32", "totals": "*fp32", "sequences": "i32"}
        types |= {"table": POINTERS[self.rotation.table]} if self.rotation else {}
        types |= {"k_scale": "*fp32", "v_scale": "*fp32", "ancestors": "*i32"}
        types |= dict.fromkeys(COPIES, copy_pointer(self.dtype))
        types |= {"k_pages": POINTERS[self.stored], "v_pages": POINTERS[self.stored]}
        return tuple((name, types.get(name, POINTERS[self.dtype])) for name in names)

    def kernel(
        self, function: str, names: tuple[str, ...], constants: dict[str, Any], warps: int, stages: int
    ) -> Kernel:
        """Activations, pools and workspace start at multiples of 16 bytes; step tensors may start anywhere."""
        names += SCALE_NAMES if self.quantised else ()
        names += ("ancestors",) if self.tree and function.startswith(TREES) else ()
        aligned = {"query", "key", "value", "k_pages", "v_pages", "y", "parts", "tops", "totals", *COPIES}
        divisible = tuple(name for name in names if name in aligned)
        return Kernel(
            f"paged_attention.{function}", self.signature(*names), tuple(constants.items()), warps, stages, divisible
        )

    def inputs(self, *indices: int) -> tuple[Operand, ...]:
        # what is absent is never read, or is in the query: its pointer will do
        absent = {i for i, tensor in enumerate(self.site.inputs) if tensor is None}
        absent |= set() if self.rotation else {TABLE}
        return tuple(Operand("input", QUERY if i in absent else i) for i in indices)

    def scale_inputs(self, trees: bool = False) -> tuple[Operand, ...]:
        """And, for kernels that know of trees, what follows the scales."""
        found = self.inputs(K_SCALE, V_SCALE) if self.quantised else ()
        return found + (self.inputs(ANCESTORS) if trees and self.tree else ())

    def write(self) -> Launch:
        """K and V to their slots."""
        k_width, v_width = self.kv_heads * self.d, self.kv_heads * self.dv
        strides = {name: number for name, number in self.strides().items() if name != "STRIDE"}
        constants = strides | {
            "K_WIDTH": k_width, "V_WIDTH": v_width, "BLOCK": triton.next_power_of_2(max(k_width, v_width)),
            "D": self.d, "DV": self.dv, **copy_constants(self.site), **scale_constants(self.site),
        }  # fmt: skip
        places, _ = copies(self.site)
        names = ("key", "value", "slots", "k_pages", "v_pages", *places)
        kernel = self.kernel("write:write_kernel", names, constants, 4, 1)
        pools = self.inputs(KEY, VALUE, SLOTS, K_PAGES, V_PAGES)
        arguments = (*pools, *places.values(), *self.scale_inputs())
        return Launch(kernel, (self.tokens, 1, 1), arguments)

    def chunk(self, rows: int, bn: int, warps: int, stages: int, *, skip_decode: bool, past: str = "any") -> Launch:
        tokens = max(1, rows // self.bg)
        if tokens * self.bg < 16:
            tokens = 16 // self.bg
        constants = {
            "S": self.sequences, "BS": triton.next_power_of_2(self.sequences), **self.constants(), "BG": self.bg,
            "TOKENS": tokens, "BN": bn, "SKIP_DECODE": skip_decode, "PAST": past, **copy_constants(self.site),
        }  # fmt: skip
        places, _ = copies(self.site)
        names = ("query", "query_start", "kv_len", "pages", "k_pages", "v_pages", "sinks", "y", *places)
        step = self.inputs(QUERY, QUERY_START, KV_LEN, PAGES, K_PAGES, V_PAGES, SINKS)
        arguments = (*step, Operand("output", 0), *places.values(), *self.scale_inputs(trees=True))
        kernel = self.kernel("chunk:chunk_kernel", names, constants, warps, stages)
        return Launch(kernel, (self.kv_heads, self.tokens // tokens + self.sequences, 1), arguments)

    def programs(self, bn: int) -> list[int]:
        """Programs of a key head, likeliest first: for 2, 3, 4 or 1 on each multiprocessor; no more than shares."""
        most = triton.cdiv(self.sequences * triton.cdiv(self.reach, 16), 2 * bn // 16)
        wanted = (max(1, min(most, n * self.site.device.num_sms // self.kv_heads)) for n in (2, 3, 4, 1))
        return list(dict.fromkeys(wanted))

    def whole(self, bn: int, warps: int, stages: int) -> Launch:
        constants = {**self.own_constants(), **self.constants(), "BM": self.decode_rows, "BN": bn}
        kernel = self.kernel("whole:whole_kernel", (*STEP_NAMES, "y"), constants, warps, stages)
        arguments = (*self.inputs(*STEP_INPUTS), Operand("output", 0), *self.scale_inputs())
        return Launch(kernel, (self.kv_heads, self.sequences, 1), arguments)

    @property
    def in_halves(self) -> bool:
        """Whether `short.py` serves: pages of 8 bits, and rotation of whole heads, their second half with the first."""
        r = self.rotation
        whole = r is not None and (r.rotary, r.offset, r.interleaved) == (self.d, 0, False)
        even = self.d == self.dv == triton.next_power_of_2(self.d) >= 32
        return self.quantised and self.packed and self.itemsize == 2 and whole and even

    def fits_short(self, bn: int, warps: int, stages: int) -> bool:
        """Stages of keys and values as they are stored, and what is put in another order on its way."""
        needed = 2 * stages * bn * self.d + (16 << 10)
        return self.in_halves and needed <= shared_memory(self.site.device.capability)

    def short(self, bn: int, warps: int, stages: int) -> Launch:
        """The newest keys and values are rounded, and written, by the program that attends them."""
        own = {name: self.own_constants()[name] for name in ("STRIDE", "KEY_AT", "VALUE_AT")}
        own |= {name: number for name, number in self.constants().items() if name not in ("DV", "BD", "BDV")}
        constants = {**own, "BM": self.decode_rows, "BN": bn, "AHEAD": AHEAD}
        kernel = self.kernel("short:short_kernel", (*STEP_NAMES, "y"), constants, warps, stages)
        arguments = (*self.inputs(*STEP_INPUTS), Operand("output", 0), *self.scale_inputs())
        return Launch(kernel, (self.kv_heads, self.sequences, 1), arguments)

    def decode(
        self, bn: int, warps: int, stages: int, programs: int, *, own: bool, queries: int = 1, room: int = 0
    ) -> tuple[Launch, int, int]:
        """(launch, bytes of workspace, bytes of zeros). room: bytes of the workspace that others have, in front."""
        counters = self.kv_heads * programs
        parts = 2 * counters * queries * self.group
        at_tops = room + _aligned(4 * parts * self.dv)
        at_totals = at_tops + _aligned(4 * parts)
        constants = {
            "BS": max(256, triton.next_power_of_2(self.sequences)), **self.own_constants(), "OWN": own,
            **self.constants(), "BM": block(queries * self.bg), "BN": bn, "BG": self.bg, "QUERIES": queries,
            "LEAST": max(1, 2 * bn // 16),
            "CHUNK": max(1, min(16, 4096 // (self.bg * block(self.dv)))),
        }  # fmt: skip
        names = (*STEP_NAMES, "y", "parts", "tops", "totals", "arrived", "sequences")
        kernel = self.kernel("decode:decode_kernel", names, constants, warps, stages)
        arguments: tuple[Operand | int, ...] = (
            *self.inputs(*STEP_INPUTS), Operand("output", 0),
            *(Operand("workspace", at) for at in (room, at_tops, at_totals)), Operand("zeros", 0), self.sequences,
            *self.scale_inputs(trees=True),
        )  # fmt: skip
        return Launch(kernel, (self.kv_heads, programs, 1), arguments), at_totals + _aligned(4 * parts), 4 * counters


def copies(site: Site) -> tuple[dict[str, Operand], int]:
    """Where, in the workspace, tiles of prompts find keys and values of the step as they are multiplied, besides their
    places in pages of 8 bits: in the order of tokens, [tokens, kv_heads, head_dim] each; and how many bytes they take.
    ({}, 0) with plain pages, in buckets for few query tokens of a sequence, and with heads of few columns."""
    query, k_pages, a = site.inputs[QUERY], site.inputs[K_PAGES], site.attributes
    assert query is not None and k_pages is not None
    if k_pages.dtype == query.dtype or site.max_query or min(a["head_dim"], a["v_head_dim"]) < LEAST_COLUMNS:
        return {}, 0
    itemsize = 4 if query.dtype == "float32" else 2
    sizes = [_aligned(query.shape[0] * a["num_kv_heads"] * a[d] * itemsize) for d in ("head_dim", "v_head_dim")]
    return {"own_k": Operand("workspace", 0), "own_v": Operand("workspace", sizes[0])}, sum(sizes)


def copy_constants(site: Site) -> dict[str, Any]:
    """Where there are none."""
    return {} if copies(site)[0] else dict.fromkeys(COPIES)


def copy_pointer(dtype: str) -> str:
    """They are in fp16, which `stored.py: factors` makes of queries in bf16, too."""
    return POINTERS["float32" if dtype == "float32" else "float16"]


def stored_type(site: Site) -> str:
    """The element type that kernels know the pages by: fp8 is bytes to a GPU that cannot convert it."""
    pages = site.inputs[K_PAGES]
    assert pages is not None
    return "uint8" if pages.dtype == "float8_e4m3fn" and site.device.capability < FP8_FROM else pages.dtype


def scale_constants(site: Site) -> dict[str, Any]:
    """Whether there are scales, and whether each head has its own."""
    shapes = [scale.shape for scale in site.inputs[K_SCALE:ANCESTORS] if scale is not None]
    if not shapes:
        return {"k_scale": None, "v_scale": None, "K_STEP": 0, "V_STEP": 0}
    return {name: int(shape != (1,)) for name, shape in zip(("K_STEP", "V_STEP"), shapes, strict=True)}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 256) * 256
