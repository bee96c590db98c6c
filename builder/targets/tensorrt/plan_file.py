"""ONNX -> TensorRT's plan, in one file: parse with weights where they lie, build, write as it comes.

Nothing here holds a second copy of the weights: the parser is pointed at the mapped file, and the plan goes to disk as
a stream. What TensorRT refuses is one sentence with node, op and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ....engines.errors import BuildError
from ....plugins.tensorrt import api as trt
from ....plugins.tensorrt import flavour
from ....plugins.tensorrt.log import Log, one_line
from ..timing_cache import cache_folder
from .direct_file import DirectFile
from .onnx_graph import MappedWeights
from .profiles import Range, add_profile
from .progress import monitor
from .timing_cache import KeptCache

GIB = 1 << 30
# above what benchmarks/tensorrt_build.py measured of Llama 3 8B's shape (TensorRT for RTX 1.7): 3.5 GiB for 2.8 GiB of
# weights, 6.0 for 4.4; TensorRT has the plan in memory before it writes it
BASE_BYTES, PER_WEIGHT_BYTE = 0.5 * GIB, 1.5


def expected_bytes(num_bytes: int) -> int:
    """Memory that a build takes at most for `num_bytes` of weights, beside the pages of the weights' file, which the
    system may take back."""
    return int(BASE_BYTES + PER_WEIGHT_BYTE * num_bytes)


def last_log() -> Path:
    """Where what TensorRT said in the last build is kept."""
    return cache_folder() / "tensorrt" / "last-build.log"


def build(
    model: ir.Model, proto: onnx.ModelProto, weights: MappedWeights, profiles: Sequence[Mapping[str, Range]],
    capability: int, out: Path, log: Log, on_progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Writes TensorRT's plan to `out`. The ops of the plugins are registered by the caller.

    model: what `proto` was made from, for messages. Raises BuildError: a node that TensorRT does not take, too little
    memory, or whatever else it reports. Raises OSError: the disk is full.
    """
    try:
        builder = trt.Builder(log.logger)
        network = flavour.create_network(builder)
        parser = trt.OnnxParser(network, log.logger)
        _parse(parser, model, proto, weights, log)
        config = builder.create_builder_config()
        flavour.set_capability(config, capability)
        flavour.allow_in_place(config)
        flavour.allow_capture(config)
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32, as on the other targets
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        watcher = monitor(on_progress)
        config.progress_monitor = watcher
        for shapes in profiles:
            add_profile(builder, config, shapes)
        cache = None if flavour.chooses_capability() else KeptCache.of(capability)
        if cache:
            cache.give_to(config)
        with DirectFile(out) as file:
            writer = _writer(file)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error:
                raise writer.error
        if not built or out.stat().st_size == 0:
            raise _failed(log)
        if cache:
            cache.take_from(config)
    except (MemoryError, TypeError) as error:
        # a constructor that TensorRT could not carry out is a TypeError in Python
        raise _failed(log, str(error)) from error


def _parse(parser: trt.OnnxParser, model: ir.Model, proto: onnx.ModelProto, weights: MappedWeights, log: Log) -> None:
    if not parser.load_model_proto(proto.SerializeToString()):
        raise _refused(parser, model, log)
    for name, address, size in weights.of(model.graph.initializers):
        if not parser.load_initializer(name, address, size):
            raise BuildError(f"TensorRT does not take the weight '{name}' of {size} bytes; build the engine again.")
    if not parser.parse_model_proto():
        raise _refused(parser, model, log)


def _refused(parser: trt.OnnxParser, model: ir.Model, log: Log) -> BuildError:
    """The first error of the parser, with what it is about."""
    if log.out_of_memory or not parser.num_errors:
        return _failed(log)
    error = parser.get_error(0)
    name, why = error.node_name(), one_line(error.desc())
    node = next((node for node in model.graph if node.name == name), None)
    if node is None:
        return BuildError(f"TensorRT cannot read the graph: {why}; build for `--target cuda`, or report the model.")
    shapes = ", ".join("-" if v is None else f"{v.dtype and v.dtype.name}{v.shape}" for v in node.inputs)
    return BuildError(
        f"TensorRT has no layer for node '{name}' ({node.op_type} of {shapes}): {why}; build for `--target cuda`, or "
        "report the model."
    )


def _failed(log: Log, otherwise: str = "it gave no reason") -> BuildError:
    if log.out_of_memory:
        return BuildError(
            "TensorRT ran out of memory while it built; build on a machine with more, or for fewer tokens a step."
        )
    why = log.why() if log.errors else otherwise
    return BuildError(f"TensorRT could not build the engine ({why}); its log is {last_log()}.")


def _writer(file: DirectFile) -> Any:
    class Writer(trt.IStreamWriter):
        """Keeps the first error, which TensorRT would print and forget: it calls what it has not written a success."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error:
                return 0
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
