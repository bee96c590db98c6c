# What ingot uses of TensorRT's Python module, of any version (docs.nvidia.com/deeplearning/tensorrt, "Python API").
# A name that only some modules have stands under "not in every module" and is used behind hasattr.
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

__version__: str
MODULES: tuple[str, ...]

def module() -> ModuleType: ...
def get_plugin_registry() -> IPluginRegistry: ...

class DataType:
    FLOAT: DataType
    HALF: DataType
    BF16: DataType
    INT8: DataType
    INT32: DataType
    INT64: DataType
    INT4: DataType
    FP8: DataType
    UINT8: DataType
    BOOL: DataType

class TensorFormat:
    LINEAR: TensorFormat

class TensorIOMode:
    INPUT: TensorIOMode
    OUTPUT: TensorIOMode

class ILogger:
    class Severity:
        INTERNAL_ERROR: ILogger.Severity
        ERROR: ILogger.Severity
        WARNING: ILogger.Severity
        INFO: ILogger.Severity
        VERBOSE: ILogger.Severity
        def __lt__(self, other: ILogger.Severity) -> bool: ...

    def __init__(self) -> None: ...
    def log(self, severity: ILogger.Severity, msg: str) -> None: ...

class Dims:
    def __init__(self, shape: Sequence[int]) -> None: ...
    def __iter__(self) -> Iterator[int]: ...
    def __len__(self) -> int: ...

class IDimensionExpr:
    def is_constant(self) -> bool: ...
    def get_constant_value(self) -> int: ...

class DimsExprs:
    def __init__(self, size: int | list[IDimensionExpr]) -> None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> IDimensionExpr: ...
    def __setitem__(self, index: int, value: IDimensionExpr) -> None: ...

class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr: ...

class PluginTensorDesc:
    dims: Dims
    type: DataType
    format: TensorFormat

class DynamicPluginTensorDesc:
    desc: PluginTensorDesc

class PluginFieldType:
    CHAR: PluginFieldType

class PluginField:
    def __init__(self, name: str, data: np.ndarray, type: PluginFieldType) -> None: ...
    name: str
    data: Any

class PluginFieldCollection:
    def __init__(self, fields: Sequence[PluginField]) -> None: ...
    def __iter__(self) -> Iterator[PluginField]: ...

class IPluginV3:
    def __init__(self) -> None: ...

class IPluginV3OneCore:
    def __init__(self) -> None: ...
    plugin_name: str
    plugin_namespace: str
    plugin_version: str

class IPluginV3OneBuildV2:
    def __init__(self) -> None: ...
    num_outputs: int

class IPluginV3OneRuntime:
    def __init__(self) -> None: ...

class IPluginResourceContext: ...

class PluginCapabilityType:
    CORE: PluginCapabilityType
    BUILD: PluginCapabilityType
    RUNTIME: PluginCapabilityType

class TensorRTPhase:
    BUILD: TensorRTPhase
    RUNTIME: TensorRTPhase

class IPluginCreatorV3One:
    def __init__(self) -> None: ...
    name: str
    plugin_namespace: str
    plugin_version: str
    field_names: PluginFieldCollection

class IPluginRegistry:
    def register_creator(self, creator: IPluginCreatorV3One, plugin_namespace: str) -> bool: ...
    def get_creator(self, type: str, version: str, plugin_namespace: str) -> Any: ...

class IProgressMonitor:
    def __init__(self) -> None: ...

class IStreamWriter:
    def __init__(self) -> None: ...

class IHostMemory:
    nbytes: int

class ProfilingVerbosity:
    DETAILED: ProfilingVerbosity

class PreviewFeature:
    ALIASED_PLUGIN_IO_10_03: PreviewFeature

class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED: NetworkDefinitionCreationFlag
    def __int__(self) -> int: ...

class BuilderFlag:
    TF32: BuilderFlag
    # not in every module
    REQUIRE_USER_ALLOCATION: BuilderFlag

class MemoryPoolType:
    WORKSPACE: MemoryPoolType

class ComputeCapability:
    # the class is not in every module; its members are looked up by name
    SM89: ComputeCapability
    SM120: ComputeCapability

class IOptimizationProfile:
    def set_shape(self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None: ...

class ITimingCache:
    def serialize(self) -> IHostMemory: ...

class IBuilderConfig:
    profiling_verbosity: ProfilingVerbosity
    progress_monitor: IProgressMonitor
    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None: ...
    def set_flag(self, flag: BuilderFlag) -> None: ...
    def clear_flag(self, flag: BuilderFlag) -> None: ...
    def add_optimization_profile(self, profile: IOptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache: ...
    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> ITimingCache | None: ...
    # not in every module
    num_compute_capabilities: int
    def set_compute_capability(self, cc: ComputeCapability, index: int) -> bool: ...

class ITensor:
    name: str

class INetworkDefinition:
    num_layers: int
    num_inputs: int
    num_outputs: int
    def get_input(self, index: int) -> ITensor: ...
    def get_output(self, index: int) -> ITensor: ...

class Builder:
    def __init__(self, logger: ILogger) -> None: ...
    max_threads: int
    def create_network(self, flags: int) -> INetworkDefinition: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...
    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: IStreamWriter
    ) -> bool: ...

class ParserError:
    def desc(self) -> str: ...
    def node(self) -> int: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...

class OnnxParser:
    num_errors: int
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None: ...
    def load_model_proto(self, model: bytes) -> bool: ...
    def load_initializer(self, name: str, data: int, size: int) -> bool: ...
    def parse_model_proto(self) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...

class LayerInformationFormat:
    JSON: LayerInformationFormat

class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str: ...

class ExecutionContextAllocationStrategy:
    USER_MANAGED: ExecutionContextAllocationStrategy

class IExecutionContext:
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def infer_shapes(self) -> list[str]: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...
    # not in every module
    def is_stream_capturable(self, stream: int) -> bool: ...

class ICudaEngine:
    num_io_tensors: int
    device_memory_size_v2: int
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> TensorIOMode: ...
    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> IExecutionContext: ...
    def create_engine_inspector(self) -> EngineInspector: ...

class Runtime:
    def __init__(self, logger: ILogger) -> None: ...
    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None: ...
