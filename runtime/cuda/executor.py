"""The CUDA executor: a step is one copy to the GPU, one graph and one copy back, all on one stream.

`launch` enqueues and returns; the tokens of a step are known when its event has passed. Steps whose prompts are scored
(`prompt_logprobs`) are the exception: their logits come to the host at once, a bucket's rows at a time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from ...engines.dtypes import DTYPES
from ...engines.plan import FOLDER, MOVES, Plan
from ...engines.sampling import KINDS, MAX_LOGPROBS, PACKED, RESULTS, SAMPLE_POSITIONS, SAMPLE_ROWS, SAMPLED
from ...engines.step import KV_LEN, LOGIT_ROWS, QUERY_START, TOKENS
from ...plugins.gpu import Gpu, GpuFault, opening
from ..batch import Batch, packed_size, packed_step
from ..capacity import ServeConfig
from ..engine import Engine
from ..executor import Logprobs, Result, by_work
from ..request import Logprob, SamplingParams
from ..speculation.costs import Costs, Curve
from ..speculation.verify import depths
from .drafting import Drafting, Guesses
from .graphs import Graphs, Replays, arena_bytes, logits_of
from .heads import open_drafting
from .logprobs import top_logprobs
from .memory import check_plan, kv_pools, pages_of_pool, state_pools, step_buffers
from .moves import Moves
from .sampling import SamplingTables, check_params
from .weights import Weights

MANY = 1 << 30  # query tokens of a sequence: more than any bucket is made for
BEYOND = 3.0  # what a step costs that no bucket for verification holds, of what the largest costs: too much
MEASURING = 1.0  # seconds, at most, of finding out what steps cost


class Results(NamedTuple):
    """Where a step's results arrive: an array for each name, and the event that says they have."""

    arrays: dict[str, np.ndarray]
    event: int


class CudaExecutor:
    """Runs the plan of `engine` on the GPU at hand. opened: seconds that each part of opening took, weight bytes.

    Raises EngineError: no GPU, one of another architecture, a plan for other sizes, too little memory, damaged weights,
    a draft engine of no use.
    """

    costs: Costs | None = None
    _graphs: Replays
    _drafting: Drafting | None = None
    _moves: Moves | None = None
    _body: tuple[str, ...] = ("stage", "body")  # parts up to the logits

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
        with ExitStack() as arriving:
            weights = arriving.enter_context(Weights(gpu, engine, dummy=config.load_format == "dummy"))
            self._plan = plan = Plan.open(folder)
            check_plan(plan, engine, gpu, config)
            self.config = config = config.with_defaults(plan.max_num_seqs, plan.max_num_batched_tokens, plan.page_size)
            draft = open_drafting(gpu, engine, plan, config, self._stream) if config.draft_engine else None
            if draft:
                arriving.enter_context(draft.weights)
                self._body += draft.keeps
            planned = time.perf_counter()
            self._tables = SamplingTables(gpu, plan.max_num_seqs, plan.vocab_size, self._stream, plan.max_draft_tokens)
            self._tables.reserve(KINDS["greedy"])
            self._buffers = self._tables.addresses | step_buffers(gpu, plan, self._stream)
            self._arena = gpu.allocate(max(arena_bytes(plan), draft.arena_bytes if draft else 0), "the activations")
            later = self._tables.bytes_of(KINDS["logprobs"]) + (draft.buffer_bytes if draft else 0)
            self.num_pages = pages_of_pool(engine, gpu, config, plan, later, draft.engine if draft else None)
            self._buffers |= kv_pools(gpu, engine, plan.page_size, self.num_pages)
            self._buffers |= state_pools(gpu, draft.engine, self.num_pages * plan.page_size) if draft else {}
            self._graphs = Graphs(gpu, plan, folder, weights.addresses, self._buffers, self._arena, self._stream)
            self._results = [self._allocate_results(plan) for _ in range(2)]
            for number, bucket in enumerate(plan.buckets):
                if bucket.max_query <= 1 or config.speculate:
                    self._graphs.capture(number, *self._body, "head", "sample.greedy")
            if draft:
                draft.prepare(self._buffers, self._arena, self.num_pages)
            moved = (MOVES, *(draft.moves if draft else ()))
            self._moves = Moves(gpu, plan, self._buffers, self._graphs, moved, self._stream)
            self._drafting = draft
            gpu.synchronise(self._stream)
            captured = time.perf_counter()
        if config.speculate:
            self.costs = self._measure()
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
        if self._moves:
            self._moves.launch()
        for placement in batch.placements:
            self._tables.place(placement)
        before = depths(batch.drafts) if batch.masks and batch.drafts is not None else None
        for i, bits in batch.masks:
            self._tables.mask(int(batch.sample_rows[i]), 0 if before is None else int(before[i]), bits)
        self._buffers |= self._tables.addresses
        batch.packed[5] = self._plan.max_pages  # where a draft engine finds a row of the page table
        self._gpu.upload(self._buffers[PACKED], batch.packed, self._stream)
        longest = int(np.diff(batch.inputs[QUERY_START]).max())
        if longest > 1 and not self.config.speculate:
            longest = MANY  # buckets for verification are not captured
        # a request that was just admitted may have got pages that another one fills in this very step
        bucket = self._plan.bucket(
            len(batch.inputs[TOKENS]), batch.num_works, int(batch.inputs[KV_LEN].max()), not batch.placements, longest
        )
        sample = f"sample.{self._tables.kind_of(batch.sample_rows)}"
        self._results.reverse()
        results = self._results[0]
        rows = self._plan.buckets[bucket].rows
        if not batch.scored and len(batch.inputs[LOGIT_ROWS]) <= rows:
            self._graphs.replay(bucket, *self._body, "head", sample)
            self._download(results, sample, rows)
            guesses = self._drafting.launch(batch) if self._drafting else None
            self._gpu.record(results.event, self._stream)
            return Pending(self, batch, results, sample, guesses=guesses)
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

    def result(self, batch: Batch, arrays: dict[str, np.ndarray], sample: str, guesses: Guesses | None) -> Result:
        """Tokens, log-probabilities and guesses of a step that is done, by work."""
        result = self._sampled(batch, arrays, sample)
        tokens = arrays[SAMPLED][batch.sample_index]
        if self._moves:
            self._moves.note(batch, tokens)
        if self._drafting:
            drafts = self._drafting.settle(batch, tokens, guesses)
            result = result._replace(drafts=drafts)
        return result

    def _sampled(self, batch: Batch, arrays: dict[str, np.ndarray], sample: str) -> Result:
        index = batch.sample_index
        tokens = arrays[SAMPLED][index].tolist()
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

    def _launch_scored(self, batch: Batch, bucket: int, sample: str, results: Results) -> Pending:
        """The head again and again, a bucket's rows at a time; logits of scored rows are read on the host."""
        rows, all_rows = self._plan.buckets[bucket].rows, batch.inputs[LOGIT_ROWS]
        columns = batch.columns
        if self._drafting:
            self._drafting.follow(batch)
        prompt_logprobs: list[list[Logprobs] | None] = [None] * batch.num_works
        arrays = {name: np.zeros((len(all_rows), *array.shape[1:]), array.dtype)
                  for name, array in results.arrays.items()}  # fmt: skip
        self._graphs.replay(bucket, *self._body)
        begin = 0
        while begin < len(all_rows):
            end = min(begin + rows, len(all_rows))
            while end < len(all_rows) and columns[0, end] >= 0 and columns[0, end] == columns[0, end - 1]:
                end -= 1  # the samples of a request look at each other
            count = end - begin
            for name, values, padding in ((LOGIT_ROWS, all_rows, 0), (SAMPLE_ROWS, columns[0], -1),
                                          (SAMPLE_POSITIONS, columns[1], 0)):  # fmt: skip
                window = np.full(rows, padding, np.int32)
                window[:count] = values[begin : begin + count]
                self._gpu.upload(self._buffers[name], window, self._stream)
            self._graphs.replay(bucket, "head", sample)
            self._download(results, sample, rows)
            self._gpu.record(results.event, self._stream)
            self.wait(results.event)
            for name in KINDS[sample.removeprefix("sample.")].results:
                arrays[name][begin : begin + count] = results.arrays[name][:count]
            self._score(batch, bucket, begin, count, prompt_logprobs)
            begin = end
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

    # -- opening -------------------------------------------------------------------------------------------------------

    def _measure(self) -> Costs:
        """What steps cost, up to the largest that drafts can make: all of it on the scratch page."""
        plan, draft, config = self._plan, self._drafting, self.config
        assert config.max_num_seqs is not None
        packed = self._gpu.pinned(4 * packed_size(plan.max_num_seqs, plan.max_num_batched_tokens, 1)).view(np.int32)

        def run(size: int) -> None:
            num = min(-(-size // 2), plan.max_num_seqs)
            starts = np.arange(num + 1) * size // num
            nothing = np.zeros(size, np.int32)
            flat = packed_step(
                starts, nothing, nothing, nothing, np.diff(starts), np.zeros((num, 1), np.int32), [0], [-1], [0]
            )
            packed[: len(flat)] = flat
            self._gpu.upload(self._buffers[PACKED], packed[: len(flat)], self._stream)
            bucket = plan.bucket(size, num, longest := -(-size // num), max_query=longest)
            self._graphs.replay(bucket, *self._body, "head", "sample.greedy")
            self._gpu.synchronise(self._stream)

        held = max(bucket.tokens for bucket in plan.buckets if bucket.max_query)
        most = config.max_num_seqs * (1 + max(config.num_draft_tokens, config.num_draft_nodes))
        target = Curve.measure(run, min(held, most), MEASURING)
        if most > held:  # the logits of larger steps come in pieces, with the host in between
            target = target.then(held + 1, BEYOND * target(held))
        drafting = Curve.measure(draft.scratch, config.max_num_seqs, MEASURING) if draft else None
        return Costs(target, drafting, at_once=draft is not None and draft.at_once > 1)

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
        prompt_logprobs: list[list[Logprobs] | None] | None = None, guesses: Guesses | None = None,
    ):  # fmt: skip
        self._executor, self._batch, self._results, self._sample = executor, batch, results, sample
        self._prompt_logprobs, self._guesses = prompt_logprobs, guesses

    def wait(self) -> Result:
        self._executor.wait(self._results.event)
        result = self._executor.result(self._batch, self._results.arrays, self._sample, self._guesses)
        return result._replace(prompt_logprobs=self._prompt_logprobs)
