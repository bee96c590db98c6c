"""A KV cache in 8 bits: its scales, found while the model runs over text, and its place in the graph.

Keys are seen as the pool gets them, after the rotation. A pool's scale is known when its attention has its inputs from
all batches of text, so the same pass goes on with pages that hold what was rounded, and its logits are those of the
engine. Invariant: no pool is in 8 bits without a scale that was given for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from ..calibration import QuantisationError
from ..calibration.accuracy import Layer
from ..calibration.observers import OBSERVERS
from ..calibration.recipe import KVCache
from ..calibration.scales import Scales
from ..engines.errors import BuildError
from ..engines.step import k_pages, v_pages
from ..plugins import OPS
from ..plugins.interpreter import Bound, Values
from .journal import Journal
from .passes.graph import nodes, size
from .passes.quantise_activation import ELEMENTS

INPUTS = [parameter.name for parameter in OPS["PagedAttention"].schema.inputs]
KEY, VALUE = INPUTS.index("key"), INPUTS.index("value")
PAGES = INPUTS.index("k_pages"), INPUTS.index("v_pages")
SCALES = INPUTS.index("k_scale"), INPUTS.index("v_scale")


def quantise_pools(model: ir.Model, dtype: str, scales: Mapping[str, torch.Tensor]) -> None:
    """Changes the pools `k_pages.i`, `v_pages.i` to `dtype` ("fp8_e4m3" or "int8"), in place, and hands the scales to
    the attention nodes, as initialisers `k_scale.i`, `v_scale.i`.

    scales: by name of the pool, [1] or [kv_heads], fp32. Raises BuildError: a pool without one, or one that is none.
    """
    for node in nodes(model, "PagedAttention"):
        node.resize_inputs(len(INPUTS))
        for at, to in zip(PAGES, SCALES, strict=True):
            pool = node.inputs[at]
            assert pool is not None and pool.name and pool.shape is not None
            scale = scales.get(pool.name)
            if scale is None:
                raise BuildError(
                    f"the KV pool {pool.name} has no calibrated scale; a KV cache in {dtype} needs one for every pool."
                )
            heads = pool.shape[2]
            if scale.shape not in ((1,), (heads,)) or not (scale.isfinite() & (scale > 0)).all():
                raise BuildError(
                    f"the scale of the KV pool {pool.name} is {scale.tolist()}; expected 1 or {heads} numbers above 0."
                )
            node.replace_input_with(to, _initialiser(model, pool.name.replace("pages", "scale"), scale))
            pool.type = ir.TensorType(ELEMENTS[dtype])


def _initialiser(model: ir.Model, name: str, tensor: torch.Tensor) -> ir.Value:
    found = model.graph.initializers.get(name)
    if found is None:
        data = ir.Tensor(tensor.float().contiguous().numpy(), name=name)
        found = ir.Value(name=name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
        model.graph.register_initializer(found)
    return found


@dataclass
class PoolScales:
    """Finds the scales of all pools while `node_major.run` goes through `graph(model)`, to be given to it as `give`.

    num_batches: so many, the first ones, are calibrated with; with the others the error of each pool is measured.
    scales: those that it has already are used as they are; what is found goes there and into the journal.
    """

    kv: KVCache
    num_batches: int
    scales: Scales
    journal: Journal

    def graph(self, model: ir.Model) -> ir.Model:
        """A copy with quantised pools, whose scales come when their node's turn does. Weights are shared with it."""
        copy = model.clone()
        later = {}
        for node in nodes(copy, "PagedAttention"):
            for pool in (node.inputs[at] for at in PAGES):
                assert pool is not None and pool.name
                later[pool.name] = torch.ones(size(pool, 2) if self.kv.per == "head" else 1)
        quantise_pools(copy, self.kv.dtype, later)
        return copy

    def __call__(self, node: Bound, alive: Sequence[Values]) -> Mapping[int, torch.Tensor]:
        """Observes what an attention node is about to write: the scales that it reads, by slot.

        Raises BuildError: keys or values that are not finite, with the pool's name.
        """
        given: dict[int, torch.Tensor] = {}
        if node.op != "PagedAttention":
            return given
        layer, heads = node.attributes["layer"], node.attributes["num_kv_heads"]
        written = [_written(node, values) for values in alive]
        for i, (pool, to) in enumerate(zip((k_pages(layer), v_pages(layer)), SCALES, strict=True)):
            xs = [both[i].unflatten(1, (heads, -1)) for both in written]  # [T, kv_heads, D] of each batch
            scale = self.scales.kv.get(pool)
            if scale is None:
                try:
                    scale = self._scale(xs[: self.num_batches])
                except QuantisationError as error:
                    raise BuildError(f"the KV pool {pool} cannot be quantised: {error}") from error
                self.scales.kv[pool] = scale
            kind = f"{self.kv.dtype} per {self.kv.per}"
            self.journal.add(self.scales, Layer(pool, kind, self._error(xs[self.num_batches :], scale)))
            given[node.sources[to]] = scale
        return given

    def _scale(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        """[1] or [kv_heads]"""
        observer = OBSERVERS[self.kv.observer](channels=self.kv.per == "head")
        for x in xs:
            observer.update(x.transpose(1, 2).flatten(0, 1))  # [T * D, kv_heads]
        return observer.scale(self.kv.format).reshape(-1)

    def _error(self, xs: Sequence[torch.Tensor], scale: torch.Tensor) -> float:
        """Root mean square of what rounding changes, over that of what is stored."""
        change, whole = 0.0, 0.0
        for x in xs:
            stored = self.kv.format.round(x.float() / scale[:, None]) * scale[:, None]
            change += float((stored - x.float()).square().sum())
            whole += float(x.float().square().sum())
        return (change / whole) ** 0.5 if whole else 0.0


def _written(node: Bound, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a batch, [T, kv_heads * D] each."""
    key, value = values[node.sources[KEY]], values[node.sources[VALUE]]
    if key is None:  # packed q|k|v
        a = node.attributes
        widths = [
            a["num_heads"] * a["head_dim"],
            a["num_kv_heads"] * a["head_dim"],
            a["num_kv_heads"] * a["v_head_dim"],
        ]
        _, key, value = values[node.sources[0]].split(widths, -1)
    return key, value
