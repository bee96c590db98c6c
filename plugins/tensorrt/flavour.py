"""What differs between TensorRT and TensorRT for RTX, and between their versions, in one place.

Each function looks at what the module has, never at its name or version.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import api as trt


def about() -> tuple[str, str]:
    """Name and version of the module."""
    return trt.module().__name__, trt.__version__


def chooses_capability() -> bool:
    """Whether it builds for a compute capability that is asked for (and then without a GPU), rather than for the GPU at
    hand alone."""
    return hasattr(trt.IBuilderConfig, "num_compute_capabilities")


def capabilities() -> Sequence[int]:
    """Those it can be asked for, 89 for 8.9; none where it builds for the GPU at hand."""
    if not chooses_capability():
        return ()
    names = (name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    return sorted(int(name.removeprefix("SM")) for name in names)


def set_capability(config: trt.IBuilderConfig, capability: int) -> None:
    """Builds for this one, where it can be chosen."""
    if chooses_capability():
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), 0)


def create_network(builder: trt.Builder) -> trt.INetworkDefinition:
    """An empty network in which types are as the graph says, where that is still a choice."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def allow_in_place(config: trt.IBuilderConfig) -> None:
    """Plugins may update inputs in place (KV pools), where that has to be asked for."""
    if feature := getattr(trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None):
        config.set_preview_feature(feature, True)


def allow_capture(config: trt.IBuilderConfig) -> None:
    """All memory is given by the caller, without which TensorRT for RTX cannot be captured in a CUDA graph."""
    if flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None):
        config.set_flag(flag)


def can_capture(context: trt.IExecutionContext, stream: int) -> bool:
    """Whether the context's work can be captured, as far as it says."""
    ask = getattr(context, "is_stream_capturable", None)
    return True if ask is None else bool(ask(stream))


_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16", 17: "FP8",
          22: "INT4"}  # fmt: skip


def data_type(onnx: int) -> trt.DataType:
    """TensorRT's type of an ONNX element type; KeyError: it has none."""
    return getattr(trt.DataType, _TYPES[onnx])
