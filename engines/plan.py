"""The plan of a CUDA engine: what the builder compiled and the runtime replays, as data.

A plan has one list of launches per bucket (a step is padded to the smallest bucket that holds it). Every pointer is a
weight, a buffer or a place in the arena, every size is fixed, so a bucket is one CUDA graph: `stage` spreads the
packed step over the step tensors, `body` and `head` are the graph, `sample` turns logits into tokens (one list for each
kind of `sampling.py`). The head begins with the pick of `logit_rows`: a step that wants more rows of logits than the
bucket has runs head and sample again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "cuda"
PLAN_FILE = "plan.json"
# in the place of staging in steps of a draft engine: FIRST takes what the target sampled, NEXT what was guessed last
FIRST, NEXT = "first", "next"
# where drafts are trees: PATH in the place of FIRST, and GROW, which stages a level of them; then body and head, of
# heads those that go on from their own states, whose names begin with OWN
PATH, GROW, OWN = "path", "grow", "own."
TARGET = "target."  # before the names of the target's buffers
POOL = "states."  # before the number of a pool that a head reads, in the order of `HeadInfo.reads`
# [N, 2] int32, rows of pools to be moved (`MoveRows`, plugins/rows), and the part of buckets for verification that
# moves those of KV pools
MOVES = "moves"
ZEROS = "zeros"  # a buffer of `Plan.zeros` bytes, zero before and after every launch


def keep(states: str) -> str:
    """The part of a target's buckets that copies these hidden states [T, width] to the buffer of the same name, a pool
    [num_slots, width]; replayed behind the body where a head reads them."""
    return f"keep.{states}"


def move(states: str) -> str:
    """The part of a target's buckets for verification that moves rows of the pool of that name, as MOVES does."""
    return f"{MOVES}.{states}"


@dataclass(frozen=True)
class Argument:
    """A pointer, `offset` bytes behind a start. kind: `weight` (name: of the initialiser), `input` (name: of the graph
    input, of a buffer of `sampling.py`, of a pool of states, or ZEROS) or `arena`."""

    kind: str
    name: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: `file` in the plan's folder, its symbol, bytes of dynamic shared memory, warps of a block.

    pdl: it waits for the kernels before it by itself, so it may be launched before they are done (programmatic
    dependent launch).

    Launched with its arguments and two null pointers behind them (Triton's scratch memory, which is not used).
    """

    file: str
    symbol: str
    shared: int
    num_warps: int
    pdl: bool = False


@dataclass(frozen=True)
class Gemm:
    """A matrix product by cuBLASLt, y [rows, width] = x [rows, depth] weight [width, depth]^T + bias.

    algorithm: cuBLASLt's description of it, 64 bytes in hexadecimal, which holds for `version` of the library.
    scaled: the type of y where x and weight are FP8 with a factor for each of their rows.
    """

    rows: int
    width: int
    depth: int
    dtype: str
    bias: bool
    algorithm: str
    version: int
    scaled: str = ""


@dataclass(frozen=True)
class Launch:
    """Cubin (or product) number `cubin` on `grid` blocks, for node number `node` (-2: staging, -1: sampling).

    site: of the node in this bucket, a number in `Plan.tactics`.
    """

    cubin: int
    node: int
    site: int
    grid: tuple[int, int, int]
    arguments: tuple[Argument | int | float, ...]


@dataclass(frozen=True)
class Bucket:
    """Launches for at most `tokens` tokens of `sequences` sequences and `rows` rows of logits.

    max_query: most query tokens of a sequence: 1 in a bucket for decoding, some where drafts are verified, else 0 (any
    number).
    max_context: most keys of a sequence, 0: any number.
    arena: bytes needed; logits: offset of [rows, vocab] in it.
    """

    tokens: int
    sequences: int
    rows: int
    max_query: int
    max_context: int
    arena: int
    logits: int
    # stage, body, head (neither for TensorRT), sample.KIND; MOVES; `keep` and `move` of each hidden state; of a drafter
    # FIRST or NEXT, PATH and GROW
    parts: dict[str, tuple[Launch, ...]]


@dataclass(frozen=True)
class Plan:
    """A compiled graph. capability: 90 for 9.0; max_pages: columns of the page table; logits: their element type.

    nodes: names of the graph's nodes. tactics: what was chosen, a dictionary for each site: op, attributes,
    inputs and outputs ([shape, type, cold] each, see `plugins/tactic.py`), tactic, us. zeros: bytes of ZEROS.
    """

    capability: int
    vocab_size: int
    page_size: int
    max_pages: int
    logits: str
    nodes: tuple[str, ...]
    cubins: tuple[Cubin | Gemm, ...]
    buckets: tuple[Bucket, ...]
    tactics: tuple[dict[str, Any], ...] = ()
    zeros: int = 0

    @property
    def max_num_seqs(self) -> int:
        """Sequences that a step may have."""
        return max(bucket.sequences for bucket in self.buckets)

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens that a step may have."""
        return max(bucket.tokens for bucket in self.buckets)

    @property
    def max_draft_tokens(self) -> int:
        """Drafts of a sequence that a step can verify."""
        return max(bucket.max_query for bucket in self.buckets) - 1

    def bucket(
        self, num_tokens: int, num_sequences: int, max_context: int, apart: bool = True, max_query: int | None = None
    ) -> int:
        """Number of the first bucket that holds a step whose longest sequence has `max_context` keys.

        Every sequence of a step has a token at least. Buckets for decoding come first, then those for verification,
        each from the smallest; of equal ones the one for shorter contexts.
        apart: no sequence reads what another one writes in this step, which all but those for any step rely on.
        max_query: most tokens of a sequence; None: any number, unless each has one.
        """
        longest = max_query or (1 if num_tokens == num_sequences else num_tokens)
        for i, bucket in enumerate(self.buckets):
            if bucket.tokens < num_tokens or bucket.sequences < num_sequences:
                continue
            if bucket.max_query and (not apart or bucket.max_query < longest):
                continue
            if not bucket.max_context or bucket.max_context >= max_context:
                return i
        raise ValueError(f"no bucket holds {num_tokens} tokens of {num_sequences} sequences")

    def save(self, folder: Path) -> None:
        """Write `plan.json` into the plan's folder."""
        fields = asdict(self) | {"buckets": [_pack_bucket(bucket) for bucket in self.buckets]}
        (folder / PLAN_FILE).write_text(json.dumps(fields, separators=(",", ":")) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Plan:
        """The plan in `folder`, whose files the manifest has verified."""
        fields = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        fields["nodes"], fields["tactics"] = tuple(fields["nodes"]), tuple(fields["tactics"])
        fields["cubins"] = tuple(
            Gemm(**cubin) if "algorithm" in cubin else Cubin(**cubin) for cubin in fields["cubins"]
        )
        fields["buckets"] = tuple(_unpack_bucket(bucket) for bucket in fields["buckets"])
        return cls(**fields)


# thousands of launches: lists and short strings, not objects


def _pack_bucket(bucket: Bucket) -> dict[str, Any]:
    fields = {name: getattr(bucket, name) for name in Bucket.__dataclass_fields__}
    return fields | {"parts": {name: [pack_launch(launch) for launch in part] for name, part in bucket.parts.items()}}


def _unpack_bucket(fields: dict[str, Any]) -> Bucket:
    parts = {name: tuple(unpack_launch(launch) for launch in part) for name, part in fields["parts"].items()}
    return Bucket(**fields | {"parts": parts})


def pack_launch(launch: Launch) -> list[Any]:
    """As a flat list for JSON."""
    arguments = [f"{a.kind[0]}{a.offset}:{a.name}" if isinstance(a, Argument) else a for a in launch.arguments]
    return [launch.cubin, launch.node, launch.site, *launch.grid, *arguments]


def unpack_launch(fields: list[Any]) -> Launch:
    """What `pack_launch` made a list of."""
    cubin, node, site, x, y, z, *arguments = fields
    return Launch(cubin, node, site, (x, y, z), tuple(_argument(a) if isinstance(a, str) else a for a in arguments))


def _argument(text: str) -> Argument:
    offset, _, name = text[1:].partition(":")
    return Argument({"w": "weight", "i": "input", "a": "arena"}[text[0]], name, int(offset))
