"""Every op of ingot as a TensorRT plugin: one class, one creator for each op, registered in one call.

A plugin is its `PluginNode`, which is the one attribute of its ONNX node and all that TensorRT's plan keeps of it.
While building it answers from the op's ONNX schema; KV pools are outputs that are aliased to inputs. To run, it hands
shapes and pointers to a `Launcher`. TensorRT API: "Extending TensorRT with Custom Layers", IPluginV3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from ...engines.tensorrt import NAMESPACE, PluginNode
from . import api as trt
from .flavour import data_type
from .launcher import Launcher

FIELD, VERSION = "node", "1"


class Binding:
    """What plugins that are being made get: bytes of workspace by the name of their kernels, and what launches them
    (None while building without a GPU)."""

    workspace: dict[str, int] = {}
    launcher: Launcher | None = None


@contextmanager
def plugins_of(ops: Sequence[str], workspace: dict[str, int], launcher: Launcher | None) -> Iterator[None]:
    """Registers `ops`; the plugins that TensorRT makes inside the block, by parser or deserialiser, are bound to these.

    workspace: bytes by the name of a node's kernels.
    """
    for op in ops:
        _register(op)
    before = Binding.workspace, Binding.launcher
    Binding.workspace, Binding.launcher = workspace, launcher
    try:
        yield
    finally:
        Binding.workspace, Binding.launcher = before


@cache
def plugin_class() -> Any:
    """The class; it can be defined only once TensorRT is loaded."""

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
        def __init__(self, node: PluginNode, workspace: int, launcher: Launcher | None):
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.node, self.workspace, self.launcher = node, workspace, launcher
            self.data = _data(node.text())
            self.plugin_name, self.plugin_namespace, self.plugin_version = node.op, NAMESPACE, VERSION
            self.num_outputs = node.num_outputs + len(node.pools)

        def get_capability_interface(self, type: trt.PluginCapabilityType) -> Plugin:
            return self

        def clone(self) -> Plugin:
            return Plugin(self.node, self.workspace, self.launcher)

        # -- building --------------------------------------------------------------------------------------------------

        def get_output_data_types(self, input_types: Sequence[trt.DataType]) -> list[trt.DataType]:
            from .schema_shapes import output_types

            return [data_type(each) for each in output_types(self.node)]

        def get_output_shapes(
            self, inputs: Sequence[trt.DimsExprs], shape_inputs: Sequence[trt.DimsExprs], builder: trt.IExprBuilder
        ) -> list[trt.DimsExprs]:
            from .schema_shapes import output_shapes

            sizes = [[dim.get_constant_value() if dim.is_constant() else None for dim in _dims(each)]
                     for each in inputs]  # fmt: skip
            found = []
            for shape in output_shapes(self.node, sizes):
                dims = trt.DimsExprs(len(shape))
                for axis, size in enumerate(shape):
                    dims[axis] = builder.constant(size) if isinstance(size, int) else inputs[size[0]][size[1]]
                found.append(dims)
            return found

        def supports_format_combination(
            self, pos: int, in_out: Sequence[trt.DynamicPluginTensorDesc], num_inputs: int
        ) -> bool:
            """Row-major everywhere; types are the graph's, for the network is strongly typed."""
            if in_out[pos].desc.format != trt.TensorFormat.LINEAR:
                return False
            wanted = [*map(data_type, self.node.types), *self.get_output_data_types(())]
            return in_out[pos].desc.type == wanted[pos]

        def configure_plugin(
            self, inputs: Sequence[trt.DynamicPluginTensorDesc], outputs: Sequence[trt.DynamicPluginTensorDesc]
        ) -> None:
            pass

        def get_workspace_size(
            self, inputs: Sequence[trt.DynamicPluginTensorDesc], outputs: Sequence[trt.DynamicPluginTensorDesc]
        ) -> int:
            return self.workspace

        def get_aliased_input(self, output_index: int) -> int:
            own = output_index < self.node.num_outputs
            return -1 if own else self.node.pools[output_index - self.node.num_outputs]

        def get_valid_tactics(self) -> list[int]:
            return []

        # -- running ---------------------------------------------------------------------------------------------------

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(
            self, inputs: Sequence[trt.PluginTensorDesc], outputs: Sequence[trt.PluginTensorDesc]
        ) -> None:
            pass

        def attach_to_context(self, context: trt.IPluginResourceContext) -> Plugin:
            return self.clone()

        def get_fields_to_serialize(self) -> trt.PluginFieldCollection:
            return _fields(self.data)

        def enqueue(
            self, input_desc: Sequence[trt.PluginTensorDesc], output_desc: Sequence[trt.PluginTensorDesc],
            inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int,
        ) -> None:  # fmt: skip
            assert self.launcher is not None, "this plugin was made to be built, not to be run"
            shapes = [tuple(each.dims) for each in input_desc]
            self.launcher.launch(self.node, shapes, inputs, outputs[: self.node.num_outputs], workspace, stream)

    return Plugin


@cache
def _register(op: str) -> trt.IPluginCreatorV3One:
    """Once for each op in a process: the registry is TensorRT's own. Returns the creator, which must stay alive."""

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = op, NAMESPACE, VERSION
            self.data = _data("")
            self.field_names = _fields(self.data)

        def create_plugin(self, name: str, fields: trt.PluginFieldCollection, phase: trt.TensorRTPhase) -> Any:
            (text,) = (bytes(field.data) for field in fields if field.name == FIELD)
            node = PluginNode.of(text.rstrip(b"\0").decode())
            return plugin_class()(node, Binding.workspace.get(node.kernels, 0), Binding.launcher)

    creator = Creator()
    trt.get_plugin_registry().register_creator(creator, NAMESPACE)
    return creator


def _data(text: str) -> np.ndarray:
    """A field keeps the address of its data and not the data: whoever hands out a field must hold on to them."""
    return np.frombuffer(text.encode() + b"\0", np.int8)


def _fields(data: np.ndarray) -> trt.PluginFieldCollection:
    return trt.PluginFieldCollection([trt.PluginField(FIELD, data, trt.PluginFieldType.CHAR)])


def _dims(dims: trt.DimsExprs) -> list[trt.IDimensionExpr]:
    return [dims[axis] for axis in range(len(dims))]
