"""The graph as TensorRT's parser takes it: ingot's nodes as plugins, and weights that stay in the engine's file.

A plugin node has one attribute, inputs that are all there, and one more output for each KV pool: the graph gives the
pools back as outputs, which the caller binds to the memory of the inputs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ....engines.tensorrt import NAMESPACE, PluginNode, updated
from ....plugins.tensorrt.adapter import FIELD


def plugin_proto(model: ir.Model, plugins: Mapping[ir.Node, PluginNode]) -> onnx.ModelProto:
    """ONNX of `model` with these nodes as plugins; its weights are external, or small."""
    proto = ir.serde.serialize_model(model)
    inputs = {value.name: value for value in proto.graph.input}
    for node, written in zip(model.graph, proto.graph.node, strict=True):
        plugin = plugins.get(node)
        if plugin is None:
            continue
        present = [name for name in written.input if name]
        pools = [present[place] for place in plugin.pools]
        del written.input[:], written.attribute[:]
        written.input.extend(present)
        written.output.extend(map(updated, pools))
        written.attribute.append(onnx.helper.make_attribute(FIELD, plugin.text()))
        written.domain = NAMESPACE
        for pool in pools:
            proto.graph.output.append(inputs[pool])
            proto.graph.output[-1].name = updated(pool)
    return proto


class MappedWeights:
    """The external weights of a graph, mapped and not read: an address and a size in bytes by name.

    Raises OSError: a file cannot be read. The mapping lives as long as this does.
    """

    def __init__(self, model: ir.Model, folder: Path):
        self._files: dict[str, np.memmap] = {}
        self._places: dict[str, tuple[int, int]] = {}
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            location = str(tensor.location)
            if location not in self._files:
                self._files[location] = np.memmap(folder / location, np.uint8, "r")
            assert tensor.offset is not None and tensor.length is not None
            self._places[name] = (self._files[location].ctypes.data + tensor.offset, tensor.length)

    def of(self, names: Container[str]) -> Iterator[tuple[str, int, int]]:
        """Those with one of the names."""
        return ((name, *place) for name, place in self._places.items() if name in names)

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self._places.values())
