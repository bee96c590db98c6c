"""The TensorRT executor: the CUDA executor's step, with TensorRT's engine in the place of the plan's body and head.

The plan beside TensorRT's has staging and sampling for each bucket; batches, tables, KV pool and results are the CUDA
executor's own.
"""

from __future__ import annotations

import time

from ...engines.errors import EngineError
from ...engines.plan import Plan
from ...engines.sampling import KINDS, PACKED
from ...engines.step import k_pages, v_pages
from ...engines.tensorrt import FOLDER, Plugins
from ...plugins.gpu import GpuFault
from ...plugins.tensorrt import flavour
from ...plugins.tensorrt.launcher import Launcher
from ..capacity import ServeConfig
from ..cuda.executor import CudaExecutor
from ..cuda.graphs import Graphs, arena_bytes
from ..cuda.memory import check_plan, kv_pools, pages_of_pool, step_buffers
from ..cuda.sampling import SamplingTables
from ..engine import Engine
from .graphs import StepGraphs
from .network import Network

EMPTY_STEP = 64  # bytes: the header of a packed step of no tokens, and the one number behind it that is read


class TensorRTExecutor(CudaExecutor):
    """Runs TensorRT's engine of `engine` on the GPU at hand.

    Raises EngineError: no TensorRT, no GPU or one that it was not built for, a plan of another version, too little
    memory, sizes that it was not built for.
    """

    def _open(self, engine: Engine, config: ServeConfig) -> None:
        gpu, began, folder = self._gpu, time.perf_counter(), engine.folder / FOLDER
        if config.load_format == "dummy":
            raise EngineError(f"{folder} has its weights inside TensorRT's plan; serve it with load_format=auto.")
        self._stream = gpu.stream()
        self._plan = plan = Plan.open(folder)
        plugins = Plugins.open(folder)
        _check_module(engine, plugins, gpu.name, gpu.device.capability)
        check_plan(plan, engine, gpu, config)
        self.config = config.with_defaults(plan.max_num_seqs, plan.max_num_batched_tokens, plan.page_size)
        planned = time.perf_counter()
        launcher = Launcher(gpu, folder, plan, plugins)
        self._network = Network(gpu, folder, plugins, launcher)
        loaded = time.perf_counter()
        self._tables = SamplingTables(gpu, plan.max_num_seqs, plan.vocab_size, self._stream)
        self._tables.reserve(KINDS["greedy"])
        self._buffers = self._tables.addresses | step_buffers(gpu, plan, self._stream)
        gpu.fill(self._buffers[PACKED], EMPTY_STEP, 0, self._stream)  # what each context runs before it is captured
        self._arena = gpu.allocate(arena_bytes(plan), "the logits")
        self.num_pages = pages_of_pool(engine, gpu, self.config, plan, self._tables.bytes_of(KINDS["logprobs"]))
        self._buffers |= kv_pools(gpu, engine, plan.page_size, self.num_pages)
        own = Graphs(gpu, plan, folder, {}, self._buffers, self._arena, self._stream)
        shapes = _pool_shapes(engine, plan, self.num_pages)
        self._graphs = StepGraphs(
            gpu, plan, own, self._network, self._buffers, shapes, self._arena, self._stream
        )  # fmt: skip
        self._results = [self._allocate_results(plan) for _ in range(2)]
        for bucket in range(len(plan.buckets)):
            self._graphs.capture(bucket, "stage", "body", "head", "sample.greedy")
        gpu.synchronise(self._stream)
        self.opened |= {
            "plan": planned - began, "weights": loaded - planned, "graphs": time.perf_counter() - loaded,
            "weight_bytes": (folder / "model.plan").stat().st_size,
        }  # fmt: skip

    def close(self) -> None:
        """Waits for the steps launched; TensorRT's objects go before the memory that they use."""
        try:
            self._gpu.use()
            self._gpu.synchronise(self._stream)
            self._network.close()
        except GpuFault:  # whoever waited for a step has heard of it
            pass
        super().close()


def _pool_shapes(engine: Engine, plan: Plan, num_pages: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, layer in enumerate(engine.manifest.kv_layers):
        for name, dim in ((k_pages(i), layer.head_dim), (v_pages(i), layer.v_head_dim)):
            shapes[name] = (num_pages, plan.page_size, layer.kv_heads, dim)
    return shapes


def _check_module(engine: Engine, plugins: Plugins, gpu: str, capability: int) -> None:
    """Raises EngineError where this TensorRT, or the GPU, cannot run the plan."""
    module, version = flavour.about()
    mend = f"`ingot build --retarget {engine.folder} --target tensorrt`"
    if module != plugins.module:
        raise EngineError(
            f"{engine.folder} was built by {plugins.module}, but {module} {version} is installed; install "
            f"{plugins.module}, name it in INGOT_TENSORRT, or compile the engine anew with {mend}."
        )
    known = flavour.capabilities()
    if known and capability not in known:
        raise EngineError(
            f"{module} {version} runs on {', '.join(map(str, known))}, but {gpu} is {capability}; use full TensorRT "
            f"(`pip install tensorrt`, then {mend}) or the cuda target."
        )
    if capability != plugins.capability:
        raise EngineError(
            f"{engine.folder} was built for compute capability {plugins.capability}, but {gpu} has {capability}; "
            f"compile it anew with {mend}."
        )
