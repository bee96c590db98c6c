"""The CUDA executor: a step is one copy to the GPU, one graph and one copy back, all on one stream.

`launch` enqueues and returns; the tokens of a step are known when its event has passed. Steps whose prompts are scored
(`prompt_logprobs`) are the exception: their logits come to the host at once, a bucket's rows at a time.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from ...engines.dtypes import DTYPES
from ...engines.errors import EngineError
from ...engines.plan import FOLDER, ZEROS, Plan
from ...engines.sampling import KINDS, MAX_LOGPROBS, PACKED, RESULTS, SAMPLE_POSITIONS, SAMPLE_ROWS
from ...engines.step import KV_LEN, LOGIT_ROWS, STEP_INPUTS, TOKENS, k_pages, v_pages
from ...plugins.gpu import Gpu, GpuFault, opening
from ..batch import Batch, packed_size
from ..capacity import ServeConfig, model_len
from ..engine import Engine
from ..executor import Logprobs, Result, by_work
from ..request import Logprob, SamplingParams
from ..speculation.costs import Costs
from .graphs import Graphs, Replays, arena_bytes, logits_of
from .logprobs import top_logprobs
from .sampling import SamplingTables, check_params
from .weights import Weights

GRAPH_RESERVE = 64 << 20  # bytes left for graphs and for what the driver loads with kernels


class Results(NamedTuple):
    """Where a step's results arrive: an array for each name, and the event that says they have."""

    arrays: dict[str, np.ndarray]
    event: int


class CudaExecutor:
    """Runs the plan of `engine` on the GPU at hand. opened: seconds that each part of opening took, weight bytes.

    Raises EngineError: no GPU, one of another architecture, a plan for other sizes, too little memory, damaged weights.
    """

    costs: Costs | None = None  # it verifies no drafts yet
    _graphs: Replays

    def __init__(self, engine: Engine, config: ServeConfig):
        began = time.perf_counter()
        self._gpu = Gpu()
        self.opened = {"gpu": time.perf_counter() - began}
        try:
            with opening():
                self._open(engine, config)
        except BaseException:
            self._gpu.release()
            raise

    def _open(self, engine: Engine, config: ServeConfig) -> None:
        """Everything is prepared while the weights arrive."""
        gpu, began, folder = self._gpu, time.perf_counter(), engine.folder / FOLDER
        self._stream = gpu.stream()
        with Weights(gpu, engine, dummy=config.load_format == "dummy") as weights:
            self._plan = plan = Plan.open(folder)
            check_plan(plan, engine, gpu, config)
            self.config = config = config.with_defaults(plan.max_num_seqs, plan.max_num_batched_tokens, plan.page_size)
            planned = time.perf_counter()
            self._tables = SamplingTables(gpu, plan.max_num_seqs, plan.vocab_size, self._stream)
            self._tables.reserve(KINDS["greedy"])
            self._buffers = self._tables.addresses | self._allocate_buffers(plan)
            self._arena = gpu.allocate(arena_bytes(plan), "the activations")
            self.num_pages = pages_of_pool(engine, gpu, config, plan, self._tables.bytes_of(KINDS["logprobs"]))
            self._buffers |= self._allocate_pools(engine, self.num_pages)
            self._graphs = Graphs(gpu, plan, folder, weights.addresses, self._buffers, self._arena, self._stream)
            self._results = [self._allocate_results(plan) for _ in range(2)]
            for bucket in range(len(plan.buckets)):
                self._graphs.capture(bucket, "stage", "body", "head", "sample.greedy")
            gpu.synchronise(self._stream)
            captured = time.perf_counter()
        self.opened |= {
            "plan": planned - began, "graphs": captured - planned, "weights": time.perf_counter() - began,
            "weight_bytes": weights.num_bytes,
        }  # fmt: skip

    def allocate(self, num_bytes: int) -> np.ndarray:
        array = self._gpu.pinned(num_bytes)
        array[:] = 0
        return array

    def launch(self, batch: Batch) -> Pending:
        self._gpu.use()
        for placement in batch.placements:
            self._tables.place(placement)
        for i, bits in batch.masks:
            self._tables.mask(int(batch.sample_rows[i]), bits)
        self._buffers |= self._tables.addresses
        self._gpu.upload(self._buffers[PACKED], batch.packed, self._stream)
        longest = int(batch.inputs[KV_LEN].max())
        # a request that was just admitted may have got pages that another one fills in this very step
        apart = not batch.placements
        bucket = self._plan.bucket(len(batch.inputs[TOKENS]), batch.num_works, longest, apart)
        sample = f"sample.{self._tables.kind_of(batch.sample_rows)}"
        self._results.reverse()
        results = self._results[0]
        rows = self._plan.buckets[bucket].rows
        if not batch.scored and len(batch.inputs[LOGIT_ROWS]) <= rows:
            self._graphs.replay(bucket, "stage", "body", "head", sample)
            self._download(results, sample, rows)
            return Pending(self, batch, results, sample)
        return self._launch_scored(batch, bucket, sample, results)

    def check(self, params: SamplingParams, num_stop_ids: int) -> None:
        check_params(params, num_stop_ids)

    def close(self) -> None:
        """Waits for the steps launched and gives the memory back."""
        try:
            self._gpu.use()
            self._gpu.synchronise(self._stream)
        except GpuFault:  # whoever waited for a step has heard of it
            pass
        self._gpu.release()

    # -- results -------------------------------------------------------------------------------------------------------

    def wait(self, event: int) -> None:
        self._gpu.use()
        self._gpu.wait(event)

    def result(self, batch: Batch, arrays: dict[str, np.ndarray], sample: str) -> Result:
        """Tokens and log-probabilities of a step that is done, by work."""
        index = batch.sample_index
        tokens = arrays["sampled"][index].tolist()
        if not KINDS[sample.removeprefix("sample.")].logprobs:
            return Result(*by_work(batch, tokens, None))
        found: list[Logprobs | None] = []
        for i, row, token in zip(index.tolist(), batch.sample_rows.tolist(), tokens, strict=True):
            number = self._tables.num_logprobs(row)
            if number is None:
                found.append(None)
                continue
            entry = {token: Logprob(float(arrays["chosen_logprob"][i]), int(arrays["chosen_rank"][i]))}
            best = zip(arrays["top_ids"][i, :number].tolist(), arrays["top_logprobs"][i, :number].tolist(), strict=True)
            for rank, (other, logprob) in enumerate(best, 1):
                entry.setdefault(other, Logprob(logprob, rank))
            found.append(entry)
        return Result(*by_work(batch, tokens, found))

    def _download(self, results: Results, sample: str, rows: int) -> None:
        for name in KINDS[sample.removeprefix("sample.")].results:
            self._gpu.download(results.arrays[name][:rows], self._buffers[name], self._stream)
        self._gpu.record(results.event, self._stream)

    def _launch_scored(self, batch: Batch, bucket: int, sample: str, results: Results) -> Pending:
        """The head again and again, a bucket's rows at a time; logits of scored rows are read on the host."""
        rows, all_rows = self._plan.buckets[bucket].rows, batch.inputs[LOGIT_ROWS]
        columns = batch.packed[-2 * len(all_rows) :].reshape(2, -1)  # sample_rows, sample_positions
        prompt_logprobs: list[list[Logprobs] | None] = [None] * batch.num_works
        arrays = {name: np.zeros((len(all_rows), *array.shape[1:]), array.dtype)
                  for name, array in results.arrays.items()}  # fmt: skip
        self._graphs.replay(bucket, "stage", "body")
        for begin in range(0, len(all_rows), rows):
            count = min(rows, len(all_rows) - begin)
            for name, values, padding in ((LOGIT_ROWS, all_rows, 0), (SAMPLE_ROWS, columns[0], -1),
                                          (SAMPLE_POSITIONS, columns[1], 0)):  # fmt: skip
                window = np.full(rows, padding, np.int32)
                window[:count] = values[begin : begin + count]
                self._gpu.upload(self._buffers[name], window, self._stream)
            self._graphs.replay(bucket, "head", sample)
            self._download(results, sample, rows)
            self.wait(results.event)
            for name in KINDS[sample.removeprefix("sample.")].results:
                arrays[name][begin : begin + count] = results.arrays[name][:count]
            self._score(batch, bucket, begin, count, prompt_logprobs)
        return Pending(self, batch, Results(arrays, results.event), sample, prompt_logprobs)

    def _score(
        self, batch: Batch, bucket: int, begin: int, count: int, prompt_logprobs: list[list[Logprobs] | None]
    ) -> None:
        """Adds the log-probabilities of the scored rows among `begin .. begin + count`."""
        dtype, vocab = DTYPES[self._plan.logits].numpy, self._plan.vocab_size
        logits_at = logits_of(self._plan.buckets[bucket], self._arena)
        for work, first, token_ids, number in batch.scored:
            low, high = max(first, begin), min(first + len(token_ids), begin + count)
            if low >= high:
                continue
            logits = np.empty((high - low, vocab), dtype)
            self._gpu.download(logits, logits_at + (low - begin) * vocab * dtype.itemsize, self._stream)
            self._gpu.synchronise(self._stream)
            found = top_logprobs(logits, token_ids[low - first : high - first], number)
            prompt_logprobs[work] = (prompt_logprobs[work] or []) + found

    # -- memory --------------------------------------------------------------------------------------------------------

    def _allocate_buffers(self, plan: Plan) -> dict[str, int]:
        """Step tensors and results, for the largest bucket."""
        sequences, tokens = plan.max_num_seqs, plan.max_num_batched_tokens
        rows = max(bucket.rows for bucket in plan.buckets)
        sizes = dict.fromkeys(STEP_INPUTS, tokens)
        sizes |= {"query_start": sequences + 1, "kv_len": sequences, "pages": sequences * plan.max_pages}
        sizes |= {LOGIT_ROWS: rows, SAMPLE_ROWS: rows, SAMPLE_POSITIONS: rows}
        sizes |= {PACKED: packed_size(sequences, tokens, plan.max_pages)}
        sizes |= {name: rows * (MAX_LOGPROBS if columns else 1) for name, (_, columns) in RESULTS.items()}
        sizes |= {ZEROS: -(-plan.zeros // 4)}
        buffers = {name: self._gpu.allocate(4 * size, "the tensors of a step") for name, size in sizes.items() if size}
        if ZEROS in buffers:
            self._gpu.fill(buffers[ZEROS], plan.zeros, 0, self._stream)
        return buffers

    def _allocate_pools(self, engine: Engine, num_pages: int) -> dict[str, int]:
        manifest, pools = engine.manifest, {}
        for i, layer in enumerate(manifest.kv_layers):
            itemsize = manifest.kv_dtype(layer).itemsize
            for name, dim in ((k_pages(i), layer.head_dim), (v_pages(i), layer.v_head_dim)):
                size = num_pages * self._plan.page_size * layer.kv_heads * dim * itemsize
                pools[name] = self._gpu.allocate(size, "the KV pages")
        return pools

    def _allocate_results(self, plan: Plan) -> Results:
        rows = max(bucket.rows for bucket in plan.buckets)
        num_logprobs = min(MAX_LOGPROBS, plan.vocab_size)
        arrays = {}
        for name, (dtype, columns) in RESULTS.items():
            shape = (rows, num_logprobs) if columns else (rows,)
            arrays[name] = self._gpu.pinned(4 * rows * (num_logprobs if columns else 1)).view(dtype).reshape(shape)
        return Results(arrays, self._gpu.event())


class Pending:
    """A launched step; `prompt_logprobs` are there already where the step had any."""

    def __init__(
        self, executor: CudaExecutor, batch: Batch, results: Results, sample: str,
        prompt_logprobs: list[list[Logprobs] | None] | None = None,
    ):  # fmt: skip
        self._executor, self._batch, self._results, self._sample = executor, batch, results, sample
        self._prompt_logprobs = prompt_logprobs

    def wait(self) -> Result:
        self._executor.wait(self._results.event)
        result = self._executor.result(self._batch, self._results.arrays, self._sample)
        return result._replace(prompt_logprobs=self._prompt_logprobs)


def check_plan(plan: Plan, engine: Engine, gpu: Gpu, config: ServeConfig) -> None:
    """Raises EngineError where the plan cannot serve this GPU or this configuration."""
    folder, have = engine.folder, gpu.device.capability
    mend = f"build it again for this GPU with `ingot build {engine.manifest.model.source} -o {folder} --target cuda`"
    if plan.capability // 10 != have // 10 or plan.capability > have:  # cubins run on later GPUs of their generation
        raise EngineError(
            f"{folder} was compiled for compute capability {plan.capability / 10}, but {gpu.name} has {have / 10}; "
            f"{mend}."
        )
    for name, most in (("max_num_seqs", plan.max_num_seqs), ("max_num_batched_tokens", plan.max_num_batched_tokens)):
        asked = getattr(config, name)
        if asked is not None and asked > most:
            option = f"--{name.replace('_', '-')} {asked}"
            raise EngineError(
                f"{name} is {asked}, but {folder} was built for at most {most}; ask for less, or {mend} {option}."
            )
    if config.page_size not in (None, plan.page_size):
        raise EngineError(
            f"page_size is {config.page_size}, but {folder} was built for pages of {plan.page_size}; leave it out."
        )


def pages_of_pool(engine: Engine, gpu: Gpu, config: ServeConfig, plan: Plan, later: int) -> int:
    """Pages of the pool; `later` bytes will be allocated while serving, besides what graphs and the driver take.

    Raises EngineError if a request of full length would not fit, with the numbers.
    """
    manifest, reserve = engine.manifest, GRAPH_RESERVE + later
    page_bytes = manifest.kv_bytes_per_token * plan.page_size
    free, total = gpu.memory()
    room = min(free, int(total * config.gpu_memory_utilization) - (total - free)) - reserve
    if config.num_kv_pages is not None:
        num = config.num_kv_pages
    elif config.kv_cache_memory is not None:
        num = config.kv_cache_memory // page_bytes
    else:
        num = max(0, room) // page_bytes
    full = -(-model_len(manifest, config) // plan.page_size)
    needed = full + 1 if config.max_model_len is not None else 2
    numbers = (
        f"{gpu.name} has {total / 2**30:.1f} GiB, {free / 2**30:.1f} free after the weights; at "
        f"gpu_memory_utilization={config.gpu_memory_utilization:g} {max(0, room) / 2**30:.2f} GiB are left for KV pages"
    )
    if num < needed:
        raise EngineError(
            f"The KV pool would have {num} pages of {page_bytes / 2**20:.2f} MiB, but {needed} are needed: {numbers}; "
            "ask for more, for a smaller max_model_len, or free some memory."
        )
    if num * page_bytes > free - reserve:
        raise EngineError(f"{num} KV pages need {num * page_bytes / 2**30:.2f} GiB: {numbers}; ask for fewer.")
    return num
