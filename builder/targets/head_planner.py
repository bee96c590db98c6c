"""Plans of heads: engines that draft from a target's hidden states, launched behind its steps.

A step of a head reads states of the target (`features`, gathered from pools by slot) or, where it goes on from its own
guess, what it gave itself (`drafted`); the other of the two inputs is zero, and in buckets for decoding that is always
the first, in all others always the second. So each kind of bucket leaves out what only a zero goes through. The state
that it gives is written where the next step reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from ...engines.errors import BuildError
from ...engines.manifest import HeadInfo
from ...engines.plan import FIRST, GROW, NEXT, OWN, POOL, TARGET, Bucket
from ...engines.sampling import BASES, KINDS, LAST_TOKEN, PACKED, PARENTS, SAMPLED, STATE_SLOTS, Kind
from ...engines.step import (
    ANCESTORS,
    DRAFTED,
    FEATURES,
    HIDDEN,
    KV_LEN,
    LOGITS,
    PAGES,
    QUERY_START,
    SLOTS,
    TOKEN_IDS,
    TOKENS,
)
from ...plugins.tactic import Site, Tensor
from .buckets import Sizes
from .planner import STAGING, Planner, Work

Value = ir.Value | str | None


@dataclass
class HeadPlanner(Planner):
    """Plans the graph of `head`; its logits are sampled from greedily, once for each of the guesses of a row."""

    head: HeadInfo | None = None

    def __post_init__(self) -> None:
        assert self.head
        super().__post_init__()
        inputs = {value.name: value for value in self._inputs}
        self._features, self._drafted = inputs[FEATURES], inputs.get(DRAFTED)
        self._hidden = next((value for value in self.graph.outputs if value.name == HIDDEN), None)
        vocab = super().logits_of(Sizes(1, 1, 1, 1)).shape[1] // self.head.guesses
        # of the weights; no node reads it, so it is not in the graph any more
        self._token_ids = ir.Value(name=TOKEN_IDS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([vocab]))

    def sites(self, sizes: Sizes) -> list[Work]:
        """`DraftHead` stands in the place of staging; behind either the target's states are read, where the graph reads
        some. Levels of a tree go on from the head's own, as steps of decoding do."""
        stage, *work = super().sites(sizes)
        if sizes.max_query == 1 and self._drafted is not None:
            return [stage, *_without(self._features, work, self._hidden)]
        found = [stage, self._reading(stage.part, SLOTS, sizes), *_without(self._drafted, work, self._hidden)]
        if self._drafted is None or not self.drafts_in(sizes):
            return found
        graph = [replace(each, part=OWN + each.part) for each in work if each.part in ("body", "head")]
        pool = replace(self.tensor(self._drafted, sizes), cold=True)
        parents = self._read(GROW, PARENTS, {DRAFTED: pool}, self._drafted, sizes)
        return [*found, parents, *_apart(_without(self._features, graph, self._hidden), self.logits)]

    def plan(self, sizes: Sizes) -> Bucket:
        """Medusa's body is empty."""
        bucket = super().plan(sizes)
        return replace(bucket, parts={"body": ()} | bucket.parts)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return {"greedy": KINDS["greedy"]}

    def drafts_in(self, sizes: Sizes) -> bool:
        """Medusa heads say all in the first step."""
        return super().drafts_in(sizes) and (sizes.max_query != 1 or self._drafted is not None)

    def logits_of(self, sizes: Sizes) -> Tensor:
        """Those of all guesses of a row follow one another."""
        assert self.head
        logits = super().logits_of(sizes)
        rows, columns = logits.shape
        return Tensor((rows * self.head.guesses, columns // self.head.guesses), logits.dtype)

    def drafts_of(self, sizes: Sizes) -> int:
        """What a head says is verified by the target."""
        return 0

    def _reading(self, part: str, slots: str, sizes: Sizes) -> Work:
        """The target's states at slots."""
        assert self.head
        pool = Tensor((1, self.head.target_hidden_size), self.tensor(self._features, sizes).dtype, cold=True)
        pools = {f"{TARGET}{POOL}{i}": pool for i in range(len(self.head.reads))}
        return self._read(part, slots, pools, self._features, sizes)

    def _read(self, part: str, slots: str, pools: Mapping[str, Tensor], y: ir.Value, sizes: Sizes) -> Work:
        tokens = Tensor((sizes.tokens,), "int32")
        site = Site("ReadStates", {}, (tokens, *pools.values()), (self.tensor(y, sizes),), self.device)
        return Work(part, STAGING, site, (slots, *pools), (y,))

    def _drafting(self, sizes: Sizes) -> list[Work]:
        assert self.head
        part = NEXT if sizes.max_query == 1 else FIRST
        outputs, tensors = self._staged(sizes)
        samples = Tensor((sizes.rows * self.head.guesses,), "int32")
        tensors = (*tensors[:-2], samples, samples)
        names = (PACKED, QUERY_START, KV_LEN, PAGES, SAMPLED, TOKENS, ANCESTORS)
        inputs: tuple[Value, ...] = (*(TARGET + name for name in names), LAST_TOKEN, self._token_ids)
        attributes = {"page_size": self.page_size, "guesses": self.head.guesses, "first": part == FIRST}
        rows = Tensor((self.max_num_seqs,), "int32")
        shapes = (*[Tensor((1,), "int32")] * len(names), rows, self.tensor(self._token_ids, sizes))
        if part == FIRST:
            outputs, tensors = (*outputs, ANCESTORS, STATE_SLOTS, BASES), (*tensors, tensors[0], tensors[0], rows)
        stage = Work(part, STAGING, Site("DraftHead", attributes, shapes, tensors, self.device), inputs, outputs)
        if part == NEXT:
            return [stage]
        grow = [] if self._drafted is None else [self._growing(sizes, self._token_ids)]
        return [stage, self._reading(FIRST, STATE_SLOTS, sizes), *grow]


def _apart(work: list[Work], shared: ir.Value) -> list[Work]:
    """The same with values of their own, but for `shared`."""
    own = {
        value: ir.Value(name=value.name, type=value.type, shape=value.shape)
        for each in work for value in each.outputs if isinstance(value, ir.Value) and value is not shared
    }  # fmt: skip

    def swapped(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(own.get(value, value) for value in values)

    return [replace(each, inputs=swapped(each.inputs), outputs=swapped(each.outputs)) for each in work]


def check_guesses(graph: ir.Graph, head: HeadInfo) -> None:
    """Raises BuildError for an engine whose manifest does not say how many guesses its logits are of."""
    ids = graph.initializers[TOKEN_IDS].shape
    logits = next(value.shape for value in graph.outputs if value.name == LOGITS)
    assert ids is not None and logits is not None
    if logits[1] != ids[0] * head.guesses:
        raise BuildError(
            f"the head has logits of {logits[1]} columns, expected {head.guesses} times the {ids[0]} tokens of its "
            "vocabulary; an older version built its engine: build it again from the checkpoint."
        )


def _without(zero: ir.Value | None, work: list[Work], hidden: ir.Value | None) -> list[Work]:
    """The same where the graph input `zero` holds zeros only; `hidden` goes to the buffer that the next step reads.

    Raises BuildError: something reads the zeros of which it is not known what comes of them.
    """
    instead: dict[Value, Value] = {hidden: DRAFTED} if hidden else {}
    zeros: set[Value] = {zero}
    kept = []
    for each in work:
        inputs = [instead.get(value, value) for value in each.inputs]
        if zero is None or zeros.isdisjoint(inputs):
            outputs = tuple(value if value is not hidden else DRAFTED for value in each.outputs)
            kept.append(replace(each, inputs=tuple(inputs), outputs=outputs))
            continue
        first, *others = inputs
        match each.site.op:
            case "Linear" if first in zeros:  # and no bias: the authors' EAGLE-3 has `fc` for what the target says only
                zeros.add(each.outputs[0])
            case "Add":
                instead[each.outputs[0]] = others[0] if first in zeros else first
            case "RMSNorm" if others[1] is not None:
                x, residual = each.site.inputs[0], each.site.inputs[2]
                read, shape = (others[1], residual) if first in zeros else (first, x)
                instead[each.outputs[1]] = read
                site = replace(each.site, inputs=(shape, each.site.inputs[1], None), outputs=each.site.outputs[:1])
                kept.append(replace(each, site=site, inputs=(read, others[0], None), outputs=each.outputs[:1]))
            case op:
                raise BuildError(f"{op} reads '{zero.name}' of the head, of which the cuda target does not know how")
    return kept
