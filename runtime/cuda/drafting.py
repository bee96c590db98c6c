"""A draft engine on the target's GPU and stream: it guesses behind each of the target's steps, on the GPU alone.

What the target samples goes straight into the draft engine's first step, each guess into the next one, and all guesses
come to the host behind the tokens. Its keys and values lie in the target's pages, token by token, so prefix hits,
preemption and rows are the scheduler's work. It may lag behind: what it has not seen of a row is computed when guesses
are wanted, and only then. Nothing here bears on what is sampled: a wrong guess costs time, never an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...engines import step as names
from ...engines.again import from_engine
from ...engines.errors import EngineError
from ...engines.plan import FIRST, FOLDER, GROW, NEXT, PATH, TARGET, Bucket, Plan
from ...engines.sampling import LAST_TOKEN, LEVEL, MAX_BRANCHES, PACKED, SAMPLED
from ...plugins.gpu import Gpu
from ..batch import Batch, packed_size, packed_step
from ..capacity import ServeConfig
from ..engine import Engine
from ..speculation.costs import run_of_level
from ..speculation.tree import Growth, Tree
from ..speculation.verify import holding, newest
from .graphs import Graphs, arena_bytes
from .memory import GRAPH_RESERVE, check_plan, kv_pools, step_buffers, tree_buffers
from .weights import Weights

GREEDY, BRANCHES = "sample.greedy", "sample.branches"


Level = tuple[np.ndarray, np.ndarray]  # [n, K] what may follow nodes of trees: tokens, logarithms of their chances


class Guesses(NamedTuple):
    """On their way to the host, for the works [M] of a batch, as many for each as `nums` says.

    chain: [steps, M] tokens. levels: instead, where trees are grown, of each level the nodes that were run, a work's
    behind those of the one before; of the first there is one.
    """

    works: np.ndarray
    nums: np.ndarray
    chain: np.ndarray
    levels: Sequence[Level] = ()


class Drafting:
    """`engine` drafts for the one whose plan is `target`. `prepare` is called when memory is settled.

    weights: on their way from the moment this exists; to be left as a context. keeps: parts of the target's buckets,
    replayed behind their bodies, that keep what it reads; moves: those that move it (`moves.py`).
    Raises EngineError: plans that do not go together, or too little memory.
    """

    lag = 0  # positions behind that of a token at which it stands here
    keeps: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    path = PATH  # the part that stages the first step where drafts are or were trees
    level: tuple[str, ...] = (GROW, "body", "head")  # parts up to the logits of a level

    def __init__(self, gpu: Gpu, engine: Engine, target: Plan, config: ServeConfig, stream: int):
        assert config.max_num_seqs is not None
        self._gpu, self._stream, self.engine = gpu, stream, engine
        self.plan = Plan.open(engine.folder / FOLDER)
        _check_plans(self.plan, target, engine, gpu, config)
        head = engine.manifest.head
        self._num_known = head.target_vocab_size if head else engine.manifest.model.vocab_size  # tokens
        self._vocab_size = min(target.vocab_size, self._num_known)
        self._most, self.at_once = config.num_draft_tokens, head.guesses if head else 1
        self._nodes, self._run, self._branching = config.num_draft_nodes, 0, 0
        if self._nodes:
            self._branching = min(MAX_BRANCHES, self.plan.vocab_size)
            self._run = min(run_of_level(self._nodes, self._most), self._branching)
        self._most_tokens = max(bucket.tokens for bucket in self.plan.buckets if bucket.max_query > 1)
        self._seen = np.zeros(config.max_num_seqs, np.int64)  # leading positions of a row whose keys are right
        self.weights = Weights(gpu, engine, dummy=config.load_format == "dummy")

    def prepare(self, buffers: dict[str, int], arena: int, num_pages: int) -> None:
        """buffers: the target's, by name; arena: room for the activations of either; num_pages: of the pools."""
        gpu, plan = self._gpu, self.plan
        self._whole = np.zeros(num_pages, bool)  # pages that are full here, too: a prefix hit finds them
        mine = step_buffers(gpu, plan, self._stream, self.at_once)
        mine[LAST_TOKEN] = gpu.allocate(4 * plan.max_num_seqs * self.at_once, "the tensors of a step")
        mine |= tree_buffers(gpu, plan)
        mine |= kv_pools(gpu, self.engine, plan.page_size, num_pages)
        self._buffers = mine | self._reads(buffers)
        self._graphs = Graphs(
            gpu, plan, self.engine.folder / FOLDER, self.weights.addresses, self._buffers, arena, self._stream
        )
        size = packed_size(plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_pages)
        self._packed = gpu.pinned(4 * size).view(np.int32)
        self._guesses = self._room(np.int32)
        self._told = [(self._nodes_room(np.int32), self._nodes_room(np.float32)) for _ in range(self._most)]
        self._levels = self._pinned(np.int32, self._most, 3)  # LEVEL, for each of them
        self._levels[:] = [(level, self._run, self._most + 2) for level in range(self._most)]
        for number, bucket in enumerate(plan.buckets):
            for parts in self._steps_in(bucket):
                self._graphs.capture(number, *parts)

    def _steps_in(self, bucket: Bucket) -> Iterator[tuple[str, ...]]:
        """The parts of steps that draft in a bucket."""
        graph = "body", "head"
        if bucket.max_query == 1 and NEXT in bucket.parts:
            yield NEXT, *graph, GREEDY
        if bucket.max_query > 1:
            yield FIRST, *graph, GREEDY
        if bucket.max_query > 1 and self._nodes:
            yield from ((self.path, *graph, how) for how in (GREEDY, BRANCHES))
            if GROW in bucket.parts:
                yield *self.level, BRANCHES

    @property
    def arena_bytes(self) -> int:
        """Of its activations."""
        return arena_bytes(self.plan)

    @property
    def buffer_bytes(self) -> int:
        """Of its step tensors, packed and unpacked, and of its graphs."""
        plan = self.plan
        packed = packed_size(plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_pages)
        return 8 * packed + plan.zeros + GRAPH_RESERVE

    # -- a step --------------------------------------------------------------------------------------------------------

    def follow(self, batch: Batch) -> None:
        """The target runs this step: what is known of its rows here. `launch` asks for it, too."""
        page_size, inputs = self.plan.page_size, batch.inputs
        slots, positions = inputs[names.SLOTS], inputs[names.POSITIONS]
        self._whole[slots[slots % page_size == 0] // page_size] = False
        for placement in batch.placements:
            work = int(np.flatnonzero(batch.rows == placement.row)[0])
            start = positions[inputs[names.QUERY_START][work]]
            found = self._whole[inputs[names.PAGES][work, : start // page_size]]
            num = len(found) if found.all() else int(found.argmin())
            self._seen[placement.row] = max(0, num * page_size - self.lag)

    def launch(self, batch: Batch) -> Guesses | None:
        """Enqueues the guesses behind the target's step, which has been enqueued; None where none are wanted."""
        self.follow(batch)
        if not batch.ahead or batch.num_ahead is None:
            return None
        plan, (works, _, samples) = self.plan, batch.ahead.table
        wanted, num = batch.num_ahead[works], len(works)
        growing = self._nodes > 0 and bool((wanted == self._nodes).any())
        path = growing or batch.nodes is not None
        nums, steps = np.minimum(wanted, self._most), self._most if growing else min(int(wanted.max()), self._most)
        num_tokens, longest_share = self._first(samples, path)
        if max(num_tokens, num * self._run if growing else 0) > self._most_tokens:
            return None
        self._catch_up(batch, path)
        reach = max(steps, longest_share, self._nodes if growing else 0)
        longest = min(int(batch.inputs[names.KV_LEN][works].max()) + reach, plan.max_pages * plan.page_size)
        first = plan.bucket(num_tokens, num, longest, max_query=longest_share)
        if path:
            self._gpu.upload(self._buffers[LEVEL], self._levels[0], self._stream)
        if growing:
            level = plan.bucket(num * self._run, num, longest, max_query=max(2, self._run))
            return Guesses(works.copy(), nums, self._guesses[:0], self._grow(first, level, num, steps))
        later = plan.bucket(num, num, longest, max_query=1)
        return Guesses(works.copy(), nums, self._guess(first, self.path if path else FIRST, later, num, steps))

    def settle(self, batch: Batch, tokens: np.ndarray, guesses: Guesses | None) -> list[Sequence[int]] | None:
        """The step is done, and `tokens` [N] were sampled: the guesses of each work, and what is known of its rows."""
        works = batch.sample_works
        last = newest(works, holding(tokens, batch.drafts, batch.nodes))
        rows, ends = batch.sample_rows[last], batch.sample_positions[last]
        self._seen[rows] = np.minimum(self._seen[rows], ends)
        if guesses is None:
            return None
        row_of, end_of = np.zeros(batch.num_works, np.int64), np.zeros(batch.num_works, np.int64)
        row_of[works[last]], end_of[works[last]] = rows, ends
        steps = 1 if guesses.levels else len(guesses.chain)  # of trees no keys are kept
        self._seen[row_of[guesses.works]] = self._seen_after(end_of[guesses.works], steps)
        found: list[Sequence[int]] = [[] for _ in range(batch.num_works)]
        if guesses.levels:
            levels = [(self._tokens(tokens), chances) for tokens, chances in guesses.levels]
            for work, tree in zip(guesses.works.tolist(), self._trees(levels, len(guesses.works)), strict=True):
                found[work] = tree.keep([token < self._vocab_size for token in tree])
            return found
        chain = self._tokens(guesses.chain)
        known = np.cumprod(chain < self._vocab_size, axis=0).sum(0)  # of each, up to the first that is strange
        nums = np.minimum(guesses.nums, known).tolist()
        for work, num, column in zip(guesses.works.tolist(), nums, chain.T.tolist(), strict=True):
            found[work] = column[:num]
        return found

    def scratch(self, size: int) -> None:
        """A step of so many sequences on the scratch page, waited for: to be timed."""
        self._scratch(size, "head", GREEDY)

    def _scratch(self, size: int, *parts: str) -> None:
        self._stage(np.zeros((size, 1), np.int32), [[0]] * size, np.zeros(size, np.int64))
        self._graphs.replay(self.plan.bucket(size, size, 1), "stage", "body", *parts)
        self._gpu.synchronise(self._stream)

    # -- what heads do otherwise ---------------------------------------------------------------------------------------

    def _reads(self, buffers: Mapping[str, int]) -> dict[str, int]:
        """Buffers of its launches that are not its own, from the target's."""
        shared = (PACKED, names.TOKENS, names.QUERY_START, names.KV_LEN, names.PAGES, names.ANCESTORS, SAMPLED)
        return {TARGET + name: buffers[name] for name in shared}

    def _first(self, samples: np.ndarray, path: bool) -> tuple[int, int]:
        """(tokens of the first step, most of a sequence): of each the one sampled last and the one before, unseen.

        path: all from the one that the first sample follows on, since drafts are or were trees.
        """
        count = self._most + 2 if path else 2
        return count * len(samples), count

    def _guess(self, first: int, part: str, later: int, num: int, steps: int) -> np.ndarray:
        """Enqueues `steps` steps for `num` sequences, in these buckets -> [steps, num], there when they are done."""
        for i in range(steps):
            bucket, stage = (later, NEXT) if i else (first, part)
            self._graphs.replay(bucket, stage, "body", "head", GREEDY)
            self._gpu.download(self._guesses[i, :num], self._buffers[SAMPLED], self._stream)
        return self._guesses[:steps, :num]

    def _grow(self, first: int, level: int, num: int, steps: int) -> list[Level]:
        """The same for trees: a step for each level of them."""
        self._graphs.replay(first, self.path, "body", "head", BRANCHES)
        levels = [self._tell(0, num)]
        for i in range(1, steps):
            self._gpu.upload(self._buffers[LEVEL], self._levels[i], self._stream)
            self._graphs.replay(level, *self.level, BRANCHES)
            levels.append(self._tell(i, num * self._run))
        return levels

    def _tell(self, level: int, num: int) -> Level:
        """Enqueues the copies of what a step says of `num` nodes."""
        tokens, chances = (room[:num] for room in self._told[level])
        self._gpu.download(tokens, self._buffers["top_ids"], self._stream)
        self._gpu.download(chances, self._buffers["top_logprobs"], self._stream)
        return tokens, chances

    def _trees(self, levels: Sequence[Level], num: int) -> list[Tree]:
        """What levels make, for `num` works."""
        growth = Growth(*levels[0])
        for tokens, chances in levels[1:]:
            shape = (num, self._run, -1)
            growth.add(growth.going_on(self._run), tokens.reshape(shape), chances.reshape(shape))
        return growth.trees(self._nodes)

    def _tokens(self, guesses: np.ndarray) -> np.ndarray:
        """The target's tokens of guesses."""
        return guesses

    def _before_first(self, kv_len: np.ndarray, samples: np.ndarray, path: bool) -> np.ndarray:
        """Leading positions that the first step relies on, from keys and samples of each sequence of the target's."""
        return kv_len - (samples if path else 1)

    def _seen_after(self, newest: np.ndarray, steps: int) -> np.ndarray:
        """Leading positions whose keys are right if all guesses are, `newest` being that of the newest token."""
        return newest + steps

    # -- inside --------------------------------------------------------------------------------------------------------

    def _catch_up(self, batch: Batch, path: bool) -> None:
        """Computes what it has not seen of the works to draft for, up to the token before the last of the step."""
        assert batch.ahead
        works, _, samples = batch.ahead.table
        kv_len, rows = batch.inputs[names.KV_LEN][works].astype(np.int64), batch.rows[works]
        begins, ends = self._seen[rows], self._before_first(kv_len, samples, path)
        left = np.maximum(ends - begins, 0)
        sequences = [self._text(batch, i) if left[i] else [] for i in range(len(works))]
        pages = batch.inputs[names.PAGES][works]
        chunk = 0
        while left.any():
            taken = np.diff(np.minimum(np.cumsum(left), self.plan.max_num_batched_tokens), prepend=0)
            some = np.flatnonzero(taken)
            if chunk:  # the buffer is still read
                self._gpu.synchronise(self._stream)
            parts = [sequences[i][begins[i] + self.lag : begins[i] + self.lag + taken[i]] for i in some]
            self._stage(pages[some], parts, begins[some])
            longest = int((begins + taken)[some].max())
            bucket = self.plan.bucket(
                int(taken.sum()), len(some), longest, apart=False, max_query=int(taken.max())
            )  # a page may be given to two requests at once, of which one fills it in this step
            self._graphs.replay(bucket, "stage", "body")
            begins, left, chunk = begins + taken, left - taken, chunk + 1
        self._seen[rows] = np.maximum(self._seen[rows], ends)
        page_size = self.plan.page_size
        full = (kv_len - samples) // page_size  # pages of tokens that stay
        self._whole[pages[np.arange(pages.shape[1]) < full[:, None]]] = True

    def _text(self, batch: Batch, i: int) -> list[int]:
        """The tokens of work number i of those to draft for, the drafts of the step behind what is known."""
        assert batch.ahead
        work = batch.ahead.table[0][i]
        known, end = batch.ahead.known[i], int(batch.inputs[names.KV_LEN][work])
        drafts = end - len(known)
        if drafts <= 0:
            return known
        stop = int(batch.inputs[names.QUERY_START][work + 1])
        return known + batch.inputs[names.TOKENS][stop - drafts : stop].tolist()

    def _room(self, dtype: type) -> np.ndarray:
        """[steps, rows] for guesses."""
        return self._pinned(dtype, self._most, self.plan.max_num_seqs)

    def _nodes_room(self, dtype: type) -> np.ndarray:
        """[nodes, branches] for what is said of a level."""
        rows = self.plan.max_num_seqs
        return self._pinned(dtype, max(rows, min(rows * self._run, self._most_tokens)), self._branching)

    def _pinned(self, dtype: type, *shape: int) -> np.ndarray:
        return self._gpu.pinned(4 * max(1, math.prod(shape))).view(dtype)[: math.prod(shape)].reshape(shape)

    def _stage(self, pages: np.ndarray, parts: list[list[int]], begins: np.ndarray) -> None:
        """Packs and uploads a step without logits: pages [S, width], tokens of each sequence, positions `begins`."""
        counts = np.array([len(part) for part in parts])
        starts = np.concatenate(([0], np.cumsum(counts)))
        owner = np.repeat(np.arange(len(parts)), counts)
        positions = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
        kv_len = begins + counts
        width = -(-int(kv_len.max()) // self.plan.page_size)
        slots = pages[owner, positions // self.plan.page_size] * self.plan.page_size + positions % self.plan.page_size
        tokens = np.minimum(np.concatenate(parts), self._num_known - 1)
        rows = np.arange(len(parts))
        flat = packed_step(starts, tokens, positions, slots, kv_len, pages[:, :width], starts[1:] - 1, rows, kv_len)
        self._packed[: len(flat)] = flat
        self._gpu.upload(self._buffers[PACKED], self._packed[: len(flat)], self._stream)


def _check_plans(plan: Plan, target: Plan, engine: Engine, gpu: Gpu, config: ServeConfig) -> None:
    check_plan(plan, engine, gpu, ServeConfig(max_num_seqs=config.max_num_seqs))
    if plan.page_size != target.page_size:
        raise EngineError(
            f"The draft engine {engine.folder} was built for pages of {plan.page_size} tokens, the target for pages of"
            f" {target.page_size}; build one of them again."
        )
    if config.num_draft_nodes and not any(BRANCHES in bucket.parts for bucket in plan.buckets):
        raise EngineError(
            f"The draft engine {engine.folder} was built by a version that drafted chains only; compile it again with"
            f" {from_engine(engine.folder, max_draft_tokens=config.num_draft_nodes)}."
        )
    # a head takes all samples of a step at once
    needed = config.num_draft_nodes or (config.num_draft_tokens if engine.manifest.head else 1)
    if plan.max_draft_tokens < needed:
        asked = f"trees of {needed}" if config.num_draft_nodes else f"{config.num_draft_tokens} tokens"
        what = f" {asked}" if plan.max_draft_tokens else ""
        raise EngineError(
            f"The draft engine {engine.folder} was built with --max-draft-tokens {plan.max_draft_tokens}, so it cannot"
            f" draft{what}; compile it again with"
            f" {from_engine(engine.folder, max_draft_tokens=max(needed, config.num_draft_tokens))}."
        )
