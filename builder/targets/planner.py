"""Graph -> launches: one bucket at a time, each node by the tactic that `choose` picks, values placed in an arena."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from ...engines.dtypes import DTYPES
from ...engines.errors import BuildError
from ...engines.plan import FIRST, GROW, MOVES, NEXT, PATH, TARGET, ZEROS, Argument, Bucket, Launch, keep, move
from ...engines.sampling import (
    BASES,
    BRANCHES,
    CHANCES,
    KINDS,
    LAST_TOKEN,
    LEVEL,
    MASKS,
    MAX_BIAS,
    MAX_BRANCHES,
    MAX_LEVELS,
    MAX_LOGPROBS,
    MAX_STOP,
    PACKED,
    PARENTS,
    PATHS,
    RESULTS,
    SAMPLE_POSITIONS,
    SAMPLE_ROWS,
    SAMPLED,
    TABLES,
    Kind,
    width,
)
from ...engines.step import (
    ANCESTORS,
    KV_LEN,
    LOGIT_ROWS,
    LOGITS,
    PAGES,
    QUERY_START,
    SLOTS,
    STATES,
    STEP_INPUTS,
    TOKENS,
)
from ...plugins import OPS
from ...plugins.opschema import complete_attributes
from ...plugins.tactic import Device, Gemm, Kernel, Operand, Site, Tactic, Tensor
from .arena import Interval, place
from .buckets import Sizes

Choose = Callable[[Site], Tactic]
STAGING, SAMPLING = -2, -1  # in the place of a node's number


@dataclass(frozen=True)
class Work:
    """A site of a bucket: its part of the bucket, the number of its node, and the values or buffers it works on."""

    part: str
    node: int
    site: Site
    inputs: tuple[ir.Value | str | None, ...]
    outputs: tuple[ir.Value | str, ...]


def key_of(site: Site) -> Hashable:
    """Sites that are equal in this are one."""
    most = site.max_query, site.max_context
    return site.op, tuple(sorted(site.attributes.items())), site.inputs, site.outputs, most


@dataclass
class Planner:
    """Plans buckets of one graph; kernels, node names and planned sites (`key_of`) are numbered over all of them."""

    graph: ir.Graph
    device: Device
    page_size: int
    max_pages: int
    max_num_seqs: int
    choose: Choose
    kernels: dict[Kernel | Gemm, int] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    planned: dict[Hashable, int] = field(default_factory=dict)
    zeros: int = 0  # bytes that the tactics of any bucket want to be zero
    runs: Callable[[ir.Node], bool] = lambda node: True  # the nodes that are planned
    max_draft_tokens: int = 0  # of a sequence that are verified in a step

    def __post_init__(self) -> None:
        self.nodes = tuple(node.name or f"{node.op_type}.{i}" for i, node in enumerate(self.graph))
        self._inputs = {value for value in self.graph.inputs if not value.is_initializer()}
        self._dims = {
            self._dim(TOKENS, 0): "tokens",
            self._dim(LOGIT_ROWS, 0): "rows",
            self._dim(KV_LEN, 0): "sequences",
        }
        (self.logits,) = (value for value in self.graph.outputs if value.name == LOGITS)
        self._states = [value for value in self.graph.outputs if (value.name or "").startswith(STATES)]
        self._ancestors = next((value for value in self._inputs if value.name == ANCESTORS), None)

    def sites(self, sizes: Sizes) -> list[Work]:
        """What a bucket launches, in order: staging, the graph's nodes, what keeps hidden states, kinds of sampling."""
        work = [self._staging(sizes)]
        part = "body"
        for i, node in enumerate(self.graph):
            if not self.runs(node):
                continue
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            num_inputs = len(node.inputs)
            if node.domain == "ingot":
                attributes = complete_attributes(node, OPS[node.op_type].schema, attributes)
                num_inputs = OPS[node.op_type].schema.max_input
            attributes.pop("layer", None)  # layers of the same shapes are one site
            inputs = (*node.inputs, *[None] * (num_inputs - len(node.inputs)))
            if not self._trees_in(sizes):
                inputs = tuple(None if value is not None and value is self._ancestors else value for value in inputs)
            if self._rows(node.outputs[0]):
                part = "head"  # and everything behind it
            shapes = tuple(None if value is None else self.tensor(value, sizes) for value in inputs)
            outputs = tuple(self.tensor(value, sizes) for value in node.outputs)
            site = Site(node.op_type, attributes, shapes, outputs, self.device)
            if any(value is not None and value.name == PAGES for value in inputs):
                site = replace(site, max_query=sizes.max_query or None, max_context=sizes.max_context or None)
            work.append(Work(part, i, site, inputs, tuple(node.outputs)))
            if part == "head" and (late := next((value for value in node.outputs if value in self._states), None)):
                raise BuildError(
                    f"'{late.name}' is made behind the choice of logit rows, where the cuda target cannot keep it."
                )
        work += [self._keeping(value, sizes) for value in self._states]
        if self._trees_in(sizes) and sizes.max_query and self.drafts_of(sizes):
            pools = [value for value in self.graph.inputs if value in self._inputs and len(value.shape or ()) == 4]
            work += [self._moving(MOVES, value.name or "", self.tensor(value, sizes), sizes) for value in pools]
            for value in self._states:
                name, pool = value.name or "", replace(self.tensor(value, sizes), cold=True)
                work.append(self._moving(move(name), name, pool, sizes))
        work += [self._sampling(name, kind, sizes) for name, kind in self.kinds.items()]
        if not self.drafts_in(sizes):
            return work
        return [*work, *self._drafting(sizes), self._sampling("branches", BRANCHES, sizes, MAX_BRANCHES)]

    def _keeping(self, states: ir.Value, sizes: Sizes) -> Work:
        """Copies a hidden state to its pool, a buffer of the same name, for heads that draft from it."""
        made = self.tensor(states, sizes)
        site = Site(
            "KeepStates", {}, (made, Tensor((sizes.tokens,), "int32")), (replace(made, cold=True),), self.device
        )
        return Work(keep(states.name or ""), STAGING, site, (states, SLOTS), (states.name or "",))

    def _moving(self, part: str, name: str, pool: Tensor, sizes: Sizes) -> Work:
        """Moves rows of a pool, a buffer of that name, as MOVES says: one for each sequence."""
        site = Site("MoveRows", {}, (pool, Tensor((sizes.sequences, 2), "int32")), (pool,), self.device)
        return Work(part, STAGING, site, (name, MOVES), (name,))

    def _drafting(self, sizes: Sizes) -> list[Work]:
        """Staging of steps in which this engine drafts for another one."""
        names = (PACKED, TOKENS, QUERY_START, KV_LEN, PAGES, SAMPLED, ANCESTORS)
        inputs = (*(TARGET + name for name in names), LAST_TOKEN, LEVEL)
        shapes = (*[Tensor((1,), "int32")] * len(names), Tensor((self.max_num_seqs,), "int32"), Tensor((3,), "int32"))
        work = []
        for part in (NEXT,) if sizes.max_query == 1 else (FIRST, PATH):
            outputs, tensors = self._staged(sizes)
            if part != NEXT:
                outputs, tensors = (*outputs, ANCESTORS, BASES), (*tensors, tensors[0], shapes[-2])
            attributes = {"page_size": self.page_size, "vocab_size": self.vocab_size, "step": part}
            work.append(Work(part, STAGING, Site("Draft", attributes, shapes, tensors, self.device), inputs, outputs))
        return work if sizes.max_query == 1 else [*work, self._growing(sizes)]

    def _growing(self, sizes: Sizes, token_ids: ir.Value | None = None) -> Work:
        """Staging of a level of trees."""
        branches, rows = min(MAX_BRANCHES, self.vocab_size), self.max_num_seqs
        outputs, tensors = self._staged(sizes)
        each, grown = tensors[0], (MAX_LEVELS, rows, MAX_BRANCHES)
        outputs = (*outputs, ANCESTORS, PARENTS, CHANCES, PATHS)
        tensors = (*tensors, each, each, Tensor(grown, "float32"), Tensor(grown, "int32"))
        told = (sizes.rows, branches)
        shapes = (
            Tensor((1,), "int32"), Tensor((3,), "int32"), Tensor(told, "int32"), Tensor(told, "float32"),
            Tensor((rows,), "int32"), None if token_ids is None else self.tensor(token_ids, sizes),
        )  # fmt: skip
        inputs = (TARGET + PACKED, LEVEL, "top_ids", "top_logprobs", BASES, token_ids)
        attributes = {"page_size": self.page_size, "vocab_size": self.vocab_size, "branches": branches}
        return Work(GROW, STAGING, Site("Grow", attributes, shapes, tensors, self.device), inputs, outputs)

    def _staging(self, sizes: Sizes) -> Work:
        names, outputs = self._staged(sizes)
        if self._trees_in(sizes):
            names, outputs = (*names, ANCESTORS), (*outputs, outputs[0])
        inputs = (Tensor((1,), "int32"), Tensor((self.max_num_seqs,), "int32"))
        return Work("stage", STAGING, Site("Unpack", {}, inputs, outputs, self.device), (PACKED, LAST_TOKEN), names)

    def _staged(self, sizes: Sizes) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        """Step tensors that every staging makes, drafts or not."""
        values = {value.name: value for value in self._inputs}
        tensors = tuple(self.tensor(values[name], sizes) for name in STEP_INPUTS)
        return (*STEP_INPUTS, SAMPLE_ROWS, SAMPLE_POSITIONS), (*tensors, *[Tensor((sizes.rows,), "int32")] * 2)

    def _sampling(self, name: str, kind: Kind, sizes: Sizes, most: int = MAX_LOGPROBS) -> Work:
        """most: log-probabilities of a row, if it tells any."""
        logits = self.logits_of(sizes)
        num_rows, vocab = logits.shape
        num_logprobs = min(most, vocab)
        tables: dict[str, Tensor] = {}
        for table, (dtype, _) in TABLES.items():
            columns = width(table, vocab)
            rows = self.max_num_seqs * (1 + self.max_draft_tokens if table == MASKS else 1)
            tables[table] = Tensor((rows, columns) if columns else (rows,), dtype)
        shapes = [tables[table] if table in kind.tables else None for table in TABLES]
        row = Tensor((num_rows,), "int32")
        drafts = self.drafts_of(sizes)
        step = Tensor((sizes.tokens,), "int32")
        verified = (step, row, step if self._trees_in(sizes) else None) if drafts else (None, None, None)
        outputs = tuple(
            Tensor((num_rows, num_logprobs) if columns else (num_rows,), dtype)
            for dtype, columns in (RESULTS[result] for result in kind.results)
        )
        attributes = {
            "num_rows": self.max_num_seqs, "num_bias": MAX_BIAS, "num_stop": MAX_STOP, "random": kind.random,
            "num_logprobs": num_logprobs if kind.logprobs else 0, "truncate": kind.truncate, "extras": kind.extras,
            "drafts": drafts,
        }  # fmt: skip
        site = Site("Sample", attributes, (logits, row, row, *shapes, *verified), outputs, self.device)
        inputs: tuple[ir.Value | str, ...] = (
            self.logits, SAMPLE_ROWS, SAMPLE_POSITIONS, *TABLES, TOKENS, LOGIT_ROWS, ANCESTORS
        )  # fmt: skip
        return Work(f"sample.{name}", SAMPLING, site, inputs, kind.results)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """How tokens are sampled, besides those of drafts that are to be trees."""
        return KINDS

    def drafts_in(self, sizes: Sizes) -> bool:
        """Whether this engine drafts for another one in steps of such a bucket."""
        return bool(self.max_draft_tokens and sizes.max_query)

    def _trees_in(self, sizes: Sizes) -> bool:
        """Whether drafts in steps of such a bucket may be trees."""
        return self._ancestors is not None and sizes.max_query != 1

    def logits_of(self, sizes: Sizes) -> Tensor:
        """What is sampled from: a row for each token."""
        return self.tensor(self.logits, sizes)

    def drafts_of(self, sizes: Sizes) -> int:
        """Drafts of a sequence that sampling verifies."""
        return sizes.max_query - 1 if sizes.max_query else self.max_draft_tokens

    def tensor(self, value: ir.Value, sizes: Sizes) -> Tensor:
        """Shape and type of a value in a bucket. Raises BuildError for a shape that the bucket does not settle."""
        if value.dtype is None or value.shape is None:
            raise BuildError(f"the value '{value.name}' has no shape or type, so the cuda target cannot plan it.")
        if value.name == QUERY_START:
            shape: list[int] = [sizes.sequences + 1]
        elif value.name == PAGES:
            shape = [sizes.sequences, self.page_columns(sizes)]
        elif value in self._inputs and len(value.shape) == 4:  # KV pool: pages are counted when the engine opens
            shape = [1, self.page_size, *(int(d) for d in value.shape[2:])]  # type: ignore[arg-type]
        else:
            shape = [d if isinstance(d, int) else self._size(value, d, sizes) for d in value.shape]
        int4 = value.dtype == ir.DataType.INT4
        name = "int4" if int4 else next(d.name for d in DTYPES.values() if d.onnx == value.dtype)
        return Tensor(tuple(shape), name, cold=value.is_initializer() or len(shape) == 4)

    def page_columns(self, sizes: Sizes) -> int:
        """Columns of the page table in a bucket."""
        return self.max_pages

    @property
    def logits_dtype(self) -> str:
        return next(d.name for d in DTYPES.values() if d.onnx == self.logits.dtype)

    @property
    def vocab_size(self) -> int:
        return self.logits_of(Sizes(1, 1, 1, 1)).shape[1]

    def plan(self, sizes: Sizes) -> Bucket:
        """The launches of a bucket, each site run by the tactic that is chosen for it."""
        work = self.sites(sizes)
        tactics = [self.choose(each.site) for each in work]
        offsets, workspaces, arena = self._places(work, tactics, sizes)
        parts: dict[str, list[Launch]] = {each.part: [] for each in work}
        for each, tactic, workspace in zip(work, tactics, workspaces, strict=True):
            site = self.planned.setdefault(key_of(each.site), len(self.planned))
            self.zeros = max(self.zeros, tactic.zeros)
            for launch in tactic.launches:
                cubin = self.kernels.setdefault(launch.kernel, len(self.kernels))
                arguments = tuple(
                    self.argument(each, a, offsets, workspace) if isinstance(a, Operand) else a
                    for a in launch.arguments
                )
                parts[each.part].append(Launch(cubin, each.node, site, launch.grid, arguments))
        return Bucket(
            sizes.tokens, sizes.sequences, sizes.rows, sizes.max_query, sizes.max_context, arena, offsets[self.logits],
            {name: tuple(launches) for name, launches in parts.items()},
        )  # fmt: skip

    def _places(
        self, work: list[Work], tactics: list[Tactic], sizes: Sizes
    ) -> tuple[dict[ir.Value, int], list[int], int]:
        """Offsets of values and of each tactic's workspace, and the size of the arena."""
        first: dict[ir.Value, int] = {}
        last: dict[ir.Value, int] = {}
        for at, each in enumerate(work):
            for value in each.outputs:
                if isinstance(value, ir.Value):
                    first.setdefault(value, at)
                    last[value] = at
            for used in each.inputs:
                if isinstance(used, ir.Value) and used in first:
                    # what the head reads stays, since the head may run more than once
                    stays = work[first[used]].part == "body" and each.part != "body"
                    last[used] = max(last[used], len(work) if stays else at)
        last[self.logits] = len(work)
        values = list(first)
        intervals = [Interval(self.tensor(v, sizes).num_bytes, first[v], last[v]) for v in values]
        intervals += [Interval(tactic.workspace, at, at) for at, tactic in enumerate(tactics)]
        offsets, total = place(intervals)
        return dict(zip(values, offsets, strict=False)), offsets[len(values) :], total

    def argument(self, work: Work, operand: Operand, offsets: Mapping[ir.Value, int], workspace: int) -> Argument:
        """An operand of a tactic as an argument of a launch; the workspace and `offsets` are places in the arena."""
        if operand.kind == "workspace":
            return Argument("arena", offset=workspace + operand.index)
        if operand.kind == "zeros":
            return Argument("input", ZEROS, operand.index)
        value = (work.inputs if operand.kind == "input" else work.outputs)[operand.index]
        assert value is not None, f"{work.site.op}: a tactic reads an input that is absent"
        if isinstance(value, str):
            return Argument("input", value, operand.offset)
        if value in offsets:
            return Argument("arena", offset=offsets[value] + operand.offset)
        return Argument("input" if value in self._inputs else "weight", value.name or "", operand.offset)

    def _dim(self, name: str, axis: int) -> Any:
        value = next(value for value in self.graph.inputs if value.name == name)
        assert value.shape is not None
        return str(value.shape[axis])

    def _rows(self, value: ir.Value) -> bool:
        return bool(value.shape) and self._dims.get(str(value.shape[0])) == "rows"  # type: ignore[index]

    def _size(self, value: ir.Value, dim: Any, sizes: Sizes) -> int:
        name = self._dims.get(str(dim))
        if name is None:
            raise BuildError(f"the value '{value.name}' has the dimension {dim}, which no size of a step settles.")
        return getattr(sizes, name)
