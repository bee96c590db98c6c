"""TensorRT's engine on the GPU: one execution context for each bucket, bound once, run on the caller's stream.

A captured graph belongs to the context that it was captured from and to its shapes, so contexts are not shared by
buckets, though those of a profile share what TensorRT compiled for it; all share one piece of memory for activations,
since steps run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...engines.errors import EngineError
from ...engines.plan import Bucket
from ...engines.step import LOGITS
from ...engines.tensorrt import ENGINE_FILE, Plugins, step_shapes, updated
from ...plugins.gpu import Gpu
from ...plugins.tensorrt import api as trt
from ...plugins.tensorrt import flavour
from ...plugins.tensorrt.adapter import plugins_of
from ...plugins.tensorrt.launcher import Launcher
from ...plugins.tensorrt.log import Log

MEMORY = "the activations of TensorRT"


class Network:
    """The engine of `folder`.
    Raises EngineError: another version's plan, a GPU that it was not built for, too little memory.
    """

    def __init__(self, gpu: Gpu, folder: Path, plugins: Plugins, launcher: Launcher):
        self._gpu, self._plugins, self._log = gpu, plugins, Log()
        self._runtime = trt.Runtime(self._log.logger)
        data = np.memmap(folder / ENGINE_FILE, np.uint8, "r")
        ops = sorted({kernels.op for kernels in plugins.kernels.values()})
        with plugins_of(ops, {}, launcher):
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._refused(folder)
        self._engine = engine
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._scratch_bytes = engine.device_memory_size_v2
        self._scratch = gpu.allocate(self._scratch_bytes, MEMORY)

    def prepare(
        self, number: int, bucket: Bucket, logits: int, buffers: Mapping[str, int],
        pools: Mapping[str, tuple[int, ...]], stream: int,
    ) -> bool:  # fmt: skip
        """A context for bucket `number` of the plan, run once, since nothing may be loaded while a graph is captured.

        logits: where its go. buffers: addresses of the step tensors and KV pools; pools: shapes of those. Returns
        whether it can be captured.
        """
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"TensorRT has no memory for one more execution context ({self._log.why()}); {ASK_LESS}.")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        context.set_optimization_profile_async(self._plugins.profile_of(number), stream)
        self._gpu.synchronise(stream)
        shapes = step_shapes(bucket, self._plugins.page_columns[number]) | dict(pools)
        addresses = {**buffers, LOGITS: logits, **{updated(name): buffers[name] for name in pools}}
        for name in self._names:
            bound = context.set_tensor_address(name, addresses[name])
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                bound = context.set_input_shape(name, shapes[name]) and bound
            if not bound:
                raise EngineError(f"TensorRT does not take {name} for a step of {bucket.tokens} tokens "
                                  f"({self._log.why()}); build the engine again.")  # fmt: skip
        self._contexts[number] = context
        self.enqueue(number, stream)
        self._gpu.synchronise(stream)
        return flavour.can_capture(context, stream)

    def enqueue(self, number: int, stream: int) -> None:
        """Enqueues the graph of a bucket. RuntimeError: TensorRT reports one."""
        if not self._contexts[number].execute_async_v3(stream):
            raise RuntimeError(f"TensorRT could not run a step ({self._log.why()})")

    def close(self) -> None:
        """Contexts first, then the engine: their destructors need each other. Nothing may be running."""
        self._contexts.clear()
        del self._engine, self._runtime

    def _refused(self, folder: Path) -> EngineError:
        module, version = flavour.about()
        made = f"{self._plugins.module} {self._plugins.version}"
        here = f"{module} {version}"
        why = f"it was built by {made}, here is {here}" if made != here else self._log.why()
        return EngineError(
            f"TensorRT cannot open {folder / ENGINE_FILE} ({why}); compile the engine here with "
            f"`ingot build --retarget {folder.parent} --target tensorrt`."
        )


ASK_LESS = "free some of the GPU's memory, or ask for fewer KV pages"
