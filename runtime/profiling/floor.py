"""The least time of an op: bytes that must move and operations that must be done, over what the machine can do.

Every operand counts once, as if no cache held it: weights and KV of the context are read, activations are read and
written. Sizes are those of the step, not of the padded bucket. An activation that stays in a cache can make an op
faster than its floor, which then shows as a ratio below 1. Where more than a product is done (experts, attention) the
operations are those of its products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ...engines.dtypes import DTYPES
from ...plugins.tactic import Site, Tensor

PRODUCTS = ("Linear", "MatMul", "Gemm")


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured in the same run: bytes read and operations of a product, a second."""

    bytes_per_s: float
    flops_per_s: float

    def microseconds(self, cost: Cost) -> float:
        """The least time that `cost` can take, reading and computing at the same time."""
        return 1e6 * max(cost.num_bytes / self.bytes_per_s, cost.flops / self.flops_per_s)


@dataclass(frozen=True)
class Cost:
    """Bytes moved and operations, an addition and a multiplication each counted; of 8-bit operands as one."""

    num_bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Load:
    """What one step computes: query tokens and keys of each sequence, rows of logits, and the numbers packed for it."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]  # a sequence's own tokens of this step included
    rows: int
    num_packed: int

    @property
    def tokens(self) -> int:
        return sum(self.queries)

    def attended(self, window: int = 0) -> tuple[int, int]:
        """(keys that are read, pairs of a query and a key it sees); `window`: keys a query sees at most, 0 for all."""
        read = pairs = 0
        for queries, keys in zip(self.queries, self.keys, strict=True):
            seen = np.arange(keys - queries + 1, keys + 1)  # by each query
            if window:
                seen = np.minimum(seen, window)
            read += min(keys, window + queries - 1) if window else keys
            pairs += int(seen.sum())
        return read, pairs


def cost(site: Site, part: str, load: Load) -> Cost:
    """What `site` must do in a step with this load. part: of the plan; `head` and `sample` work on rows of logits."""
    most = load.tokens if part in ("stage", "body") else load.rows
    outputs = sum(_num_bytes(tensor, most) for tensor in site.outputs)
    inputs = sum(_num_bytes(tensor, most) for tensor in site.inputs if tensor)
    if site.op in ("Unpack", "Draft", "DraftHead", "Grow"):
        return Cost(2 * 4 * load.num_packed)
    if site.op == "Gather":
        return Cost(2 * outputs)  # of the table only what is picked
    if "num_kv_heads" in site.attributes:
        return _attention(site, most, outputs, load)
    if site.op == "Experts":
        return _experts(site, most, outputs)
    weight = weight_of(site)
    if weight is None or site.inputs[0] is None:
        return Cost(inputs + outputs)
    each = 1.0 if DTYPES[site.inputs[0].dtype].itemsize == 1 else 2.0  # 8-bit operands: twice as many a second
    return Cost(inputs + outputs, each * min(site.inputs[0].shape[0], most) * weight[0] * weight[1])


def weight_of(site: Site) -> tuple[int, int] | None:
    """(width, depth) of a product with a weight, as numbers of its element and not of what it is packed into."""
    if not any(name in site.op for name in PRODUCTS) or len(site.inputs) < 2:
        return None
    x, weight = site.inputs[:2]
    if x is None or weight is None or len(weight.shape) != 2:
        return None
    width = weight.shape[1] if site.op == "MatMul" else weight.shape[0]  # ONNX's is [depth, width]
    return width, x.shape[-1]


def label(site: Site) -> str:
    """The op and, for a product with a weight, its shape: `Linear 6144x4096`."""
    weight = weight_of(site)
    return f"{site.op} {weight[0]}x{weight[1]}" if weight else site.op


def _attention(site: Site, most: int, outputs: float, load: Load) -> Cost:
    """Queries, keys and values of the step, its keys and values written, those of the context read."""
    heads, kv_heads, head_dim, v_head_dim = (
        int(site.attributes[name]) for name in ("num_heads", "num_kv_heads", "head_dim", "v_head_dim")
    )
    pool = next(tensor for tensor in site.inputs if tensor and len(tensor.shape) == 4)
    key_bytes = kv_heads * (head_dim + v_head_dim) * DTYPES[pool.dtype].itemsize
    read, pairs = load.attended(int(site.attributes.get("window", 0)))
    activations = sum(
        _num_bytes(tensor, most)
        for tensor in site.inputs
        if tensor and len(tensor.shape) < 4 and not tensor.dtype.startswith("int")
    )
    moved = activations + outputs + (load.tokens + read) * key_bytes
    return Cost(moved, 2.0 * heads * (head_dim + v_head_dim) * pairs)


def _experts(site: Site, most: int, outputs: float) -> Cost:
    """As many experts as the tokens can choose, each read once."""
    x, index, weights, *stacks = site.inputs
    assert x is not None and index is not None and weights is not None
    tokens, chosen = min(x.shape[0], most), index.shape[1]
    stacked = [stack for stack in stacks if stack]
    num_experts = stacked[0].shape[0]
    share = min(1.0, tokens * chosen / num_experts)
    moved = sum(_num_bytes(tensor, most) for tensor in (x, index, weights)) + outputs
    one = sum(prod(stack.shape[1:]) for stack in stacked if len(stack.shape) == 3)
    return Cost(moved + share * sum(_num_bytes(stack, most) for stack in stacked), 2.0 * tokens * chosen * one)


def _num_bytes(tensor: Tensor, most: int) -> int:
    """Of an operand; of an activation at most `most` rows."""
    shape = tensor.shape
    if shape and not tensor.cold:
        shape = (min(shape[0], most), *shape[1:])
    return replace(tensor, shape=shape).num_bytes
