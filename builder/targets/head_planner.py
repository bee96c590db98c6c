"""Plans of heads: engines that draft from a target's hidden states, launched behind its steps.

A step of a head reads states of the target (`features`, gathered from pools by slot) or, where it goes on from its own
guess, what it gave itself (`drafted`); the other of the two inputs is zero, and in buckets for decoding that is always
the first, in all others always the second. So each kind of bucket leaves out what only a zero goes through. The state
that it gives is written where the next step reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from ...engines.errors import BuildError
from ...engines.manifest import HeadInfo
from ...engines.plan import FIRST, MOVES, NEXT, POOL, TARGET
from ...engines.sampling import KINDS, LAST_TOKEN, PACKED, SAMPLED, Kind
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
        """`DraftHead` stands in the place of staging; states are read in front of the graph where it reads some."""
        own = self._drafted is not None and sizes.max_query == 1
        stage, *work = super().sites(sizes)
        zero = self._features if own else self._drafted
        return [stage, *([] if own else [self._reading(sizes)]), *_without(zero, work, self._hidden)]

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

    def _reading(self, sizes: Sizes) -> Work:
        assert self.head
        features, pools = self.tensor(self._features, sizes), self._pools(sizes)
        slots = Tensor((sizes.tokens,), "int32")
        site = Site("ReadStates", {}, (slots, *pools.values()), (features,), self.device)
        return Work("body", STAGING, site, (SLOTS, *pools), (self._features,))

    def _pools(self, sizes: Sizes) -> dict[str, Tensor]:
        """Of the target's states, by their names here."""
        assert self.head
        pool = Tensor((1, self.head.target_hidden_size), self.tensor(self._features, sizes).dtype, cold=True)
        return {f"{TARGET}{POOL}{i}": pool for i in range(len(self.head.reads))}

    def _drafting(self, sizes: Sizes) -> list[Work]:
        """The first step moves what the target left of a sample that is not where a chain would have it, too."""
        assert self.head
        first = sizes.max_query != 1
        outputs, tensors = self._staged(sizes)
        samples = Tensor((sizes.rows * self.head.guesses,), "int32")
        tensors = (*tensors[:-2], samples, samples)
        names = (PACKED, QUERY_START, KV_LEN, PAGES, SAMPLED, TOKENS, ANCESTORS)
        inputs: tuple[Value, ...] = (*(TARGET + name for name in names), LAST_TOKEN, self._token_ids)
        attributes = {"page_size": self.page_size, "guesses": self.head.guesses, "first": first}
        shapes = (*[Tensor((1,), "int32")] * len(names), Tensor((self.max_num_seqs,), "int32"))
        shapes += (self.tensor(self._token_ids, sizes),)
        if not first:
            return [Work(NEXT, STAGING, Site("DraftHead", attributes, shapes, tensors, self.device), inputs, outputs)]
        tensors, outputs = (*tensors, Tensor((sizes.sequences, 2), "int32")), (*outputs, MOVES)
        stage = Work(FIRST, STAGING, Site("DraftHead", attributes, shapes, tensors, self.device), inputs, outputs)
        return [stage, *(self._moving(FIRST, name, pool, sizes) for name, pool in self._pools(sizes).items())]


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
