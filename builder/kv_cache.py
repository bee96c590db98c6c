"""A KV cache in 8 bits: its scales, found while the model runs over text, and its place in the graph.

Keys are seen as the pool gets them, after the rotation. A pool's scale is known when its attention has its inputs from
all batches of text, so the same pass goes on with pages that hold what was rounded, and its logits are those of the
engine. Invariant: no pool is in 8 bits without a scale that was given for it.
Keys may be centred first: less a number for each channel, `k_offset.i`. All scores of a query change alike then, so
attention need not know of it, except where it has sinks or a softcap: there keys stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from ..plugins.dtypes import TORCH_DTYPES
from ..plugins.interpreter import Bound, Values
from .journal import Journal
from .passes.graph import attribute, attributes, dims, new, nodes, operand, size
from .passes.quantise_activation import ELEMENTS

INPUTS = [parameter.name for parameter in OPS["PagedAttention"].schema.inputs]
KEY, VALUE, SINKS = INPUTS.index("key"), INPUTS.index("value"), INPUTS.index("sinks")
PAGES = INPUTS.index("k_pages"), INPUTS.index("v_pages")
SCALES = INPUTS.index("k_scale"), INPUTS.index("v_scale")


def quantise_pools(model: ir.Model, dtype: str, scales: Mapping[str, torch.Tensor]) -> None:
    """Changes the pools `k_pages.i`, `v_pages.i` to `dtype` ("fp8_e4m3" or "int8"), in place, and hands the scales to
    the attention nodes, as initialisers `k_scale.i`, `v_scale.i`.

    scales: by name of the pool, [1] or [kv_heads], fp32; `k_offset.i`, [kv_heads * D], if any, is taken from keys.
    Raises BuildError: a pool without a scale, or one that is none.
    """
    for node in nodes(model, "PagedAttention"):
        node.resize_inputs(len(INPUTS))
        name = offset_of(attribute(node, "layer"))
        if name in scales:
            _centre(model, node, name, scales[name])
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
            node.replace_input_with(to, _initialiser(model, pool.name.replace("pages", "scale"), scale.float()))
            pool.type = ir.TensorType(ELEMENTS[dtype])


def offset_of(layer: int) -> str:
    """Name of what is taken from the keys of a layer."""
    return f"k_offset.{layer}"


def _centre(model: ir.Model, node: ir.Node, name: str, offset: torch.Tensor) -> None:
    """Takes the offset from the keys that a node is given, apart or packed with queries and values."""
    at = 0 if node.inputs[KEY] is None else KEY
    x = operand(node, at)
    assert x.dtype
    vector = torch.zeros(size(x, 1))
    keys = vector[_columns(attributes(node)) if at == 0 else slice(None)]
    if offset.shape != keys.shape:
        raise BuildError(f"{name} has the shape {list(offset.shape)}, expected {list(keys.shape)}; calibrate anew.")
    keys.copy_(offset)
    shift = _initialiser(model, name, vector.to(TORCH_DTYPES[int(x.dtype)]))
    node.replace_input_with(at, new(node, "Sub", [x, shift], dims(x), x.dtype))


def _columns(attributes: Mapping[str, Any]) -> slice:
    """Those of the keys in a packed q|k|v."""
    start = attributes["num_heads"] * attributes["head_dim"]
    return slice(start, start + attributes["num_kv_heads"] * attributes["head_dim"])


def _initialiser(model: ir.Model, name: str, tensor: torch.Tensor) -> ir.Value:
    found = model.graph.initializers.get(name)
    if found is None:
        data = ir.tensor(tensor.contiguous(), name=name)
        found = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(data.dtype), const_value=data)
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

    def __call__(self, node: Bound, alive: Sequence[Values]) -> Sequence[Mapping[int, torch.Tensor]]:
        """Observes what an attention node is about to write: what each batch reads, by slot, scales and centred keys.

        Raises BuildError: keys or values that are not finite, with the pool's name.
        """
        if node.op != "PagedAttention":
            return ()
        layer, heads = node.attributes["layer"], node.attributes["num_kv_heads"]
        written, given = [_written(node, values) for values in alive], dict[int, torch.Tensor]()
        whole, shifted = written, [dict[int, torch.Tensor]() for _ in alive]
        offset = self._offset(node, [key for key, _ in written[: self.num_batches]])
        if offset is not None:
            written = [(key - offset, value) for key, value in written]
            shifted = [_shifted(node, values, offset) for values in alive]
        for i, (pool, to) in enumerate(zip((k_pages(layer), v_pages(layer)), SCALES, strict=True)):
            xs = [both[i].unflatten(1, (heads, -1)) for both in written]  # [T, kv_heads, D] of each batch
            scale = self.scales.kv.get(pool)
            if scale is None:
                try:
                    scale = self._scale(xs[: self.num_batches])
                except QuantisationError as error:
                    raise BuildError(f"the KV pool {pool} cannot be quantised: {error}") from error
                self.scales.kv[pool] = scale
            kind = f"{self.kv.dtype} per {self.kv.per}" + ", centred" * (i == 0 and offset is not None)
            change = self._error(xs[self.num_batches :], scale, [both[i] for both in whole[self.num_batches :]])
            self.journal.add(self.scales, Layer(pool, kind, change))
            given[node.sources[to]] = scale
        return [given | each for each in shifted]

    def _offset(self, node: Bound, keys: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The mean of the keys [T, kv_heads * D], in their type; None where they are stored as they are."""
        if not self.kv.centred or node.sources[SINKS] or node.attributes["softcap"]:
            return None
        name = offset_of(node.attributes["layer"])
        if name not in self.scales.kv:
            mean = sum(key.float().sum(0) for key in keys) / sum(map(len, keys))
            assert isinstance(mean, torch.Tensor)
            self.scales.kv[name] = mean.to(keys[0].dtype).float()
        return self.scales.kv[name].to(keys[0].dtype)

    def _scale(self, xs: Sequence[torch.Tensor]) -> torch.Tensor:
        """[1] or [kv_heads]"""
        observer = OBSERVERS[self.kv.observer](channels=self.kv.per == "head")
        for x in xs:
            observer.update(x.transpose(1, 2).flatten(0, 1))  # [T * D, kv_heads]
        return observer.scale(self.kv.format).reshape(-1)

    def _error(self, xs: Sequence[torch.Tensor], scale: torch.Tensor, wholes: Sequence[torch.Tensor]) -> float:
        """Root mean square of what rounding changes, over that of the keys or values before they were centred."""
        change, whole = 0.0, 0.0
        for x, before in zip(xs, wholes, strict=True):
            stored = self.kv.format.round(x.float() / scale[:, None]) * scale[:, None]
            change += float((stored - x.float()).square().sum())
            whole += float(before.float().square().sum())
        return (change / whole) ** 0.5 if whole else 0.0


def _shifted(node: Bound, values: Values, offset: torch.Tensor) -> dict[int, torch.Tensor]:
    """What a node reads with centred keys, by slot."""
    slot = node.sources[KEY]
    if values[slot] is not None:
        return {slot: values[slot] - offset}
    packed = values[node.sources[0]].clone()
    packed[:, _columns(node.attributes)] -= offset
    return {node.sources[0]: packed}


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
