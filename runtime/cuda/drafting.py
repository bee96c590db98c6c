"""A draft engine on the target's GPU and stream: it guesses behind each of the target's steps, on the GPU alone.

What the target samples goes straight into the draft engine's first step, each guess into the next one, and all guesses
come to the host behind the tokens. Its keys and values lie in the target's pages, token by token, so prefix hits,
preemption and rows are the scheduler's work. It may lag behind: what it has not seen of a row is computed when guesses
are wanted, and only then. Nothing here bears on what is sampled: a wrong guess costs time, never an answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ...engines import step as names
from ...engines.errors import EngineError
from ...engines.plan import FIRST, FOLDER, NEXT, TARGET, Plan
from ...engines.sampling import LAST_TOKEN, MAX_BRANCHES, PACKED, SAMPLED
from ...plugins.gpu import Gpu
from ..batch import Batch, packed_size, packed_step
from ..capacity import ServeConfig
from ..engine import Engine
from ..speculation.tree import Tree, along
from ..speculation.verify import holding
from .graphs import Graphs, arena_bytes
from .memory import GRAPH_RESERVE, check_plan, kv_pools, step_buffers
from .weights import Weights

GREEDY, BRANCHES = "sample.greedy", "sample.branches"


class Guesses(NamedTuple):
    """On their way to the host: a chain [steps, M] for the works [M] of a batch, as many for each as `nums` says.

    branches, chances: where some want a tree (`trees` [M]), the best tokens in each place of the chain and the
    logarithms of their chances [steps, M, branches].
    """

    works: np.ndarray
    nums: np.ndarray
    trees: np.ndarray
    tokens: np.ndarray
    branches: np.ndarray
    chances: np.ndarray


class Drafting:
    """`engine` drafts for the one whose plan is `target`. `prepare` is called when memory is settled.

    weights: on their way from the moment this exists; to be left as a context. keeps: parts of the target's buckets,
    replayed behind their bodies, that keep what it reads; moves: those that move it (`moves.py`).
    Raises EngineError: plans that do not go together, or too little memory.
    """

    lag = 0  # positions behind that of a token at which it stands here
    keeps: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()

    def __init__(self, gpu: Gpu, engine: Engine, target: Plan, config: ServeConfig, stream: int):
        assert config.max_num_seqs is not None
        self._gpu, self._stream, self.engine = gpu, stream, engine
        self.plan = Plan.open(engine.folder / FOLDER)
        _check_plans(self.plan, target, engine, gpu, config)
        head = engine.manifest.head
        self._num_known = head.target_vocab_size if head else engine.manifest.model.vocab_size  # tokens
        self._vocab_size = min(target.vocab_size, self._num_known)
        self._most, self.at_once = config.num_draft_tokens, head.guesses if head else 1
        self._nodes = config.num_draft_nodes
        self._most_tokens = max(bucket.tokens for bucket in self.plan.buckets if bucket.max_query > 1)
        self._seen = np.zeros(config.max_num_seqs, np.int64)  # leading positions of a row whose keys are right
        self.weights = Weights(gpu, engine, dummy=config.load_format == "dummy")

    def prepare(self, buffers: dict[str, int], arena: int, num_pages: int) -> None:
        """buffers: the target's, by name; arena: room for the activations of either; num_pages: of the pools."""
        gpu, plan = self._gpu, self.plan
        self._whole = np.zeros(num_pages, bool)  # pages that are full here, too: a prefix hit finds them
        mine = step_buffers(gpu, plan, self._stream, self.at_once)
        mine[LAST_TOKEN] = gpu.allocate(4 * plan.max_num_seqs * self.at_once, "the tensors of a step")
        mine |= kv_pools(gpu, self.engine, plan.page_size, num_pages)
        self._buffers = mine | self._reads(buffers)
        self._graphs = Graphs(
            gpu, plan, self.engine.folder / FOLDER, self.weights.addresses, self._buffers, arena, self._stream
        )
        size = packed_size(plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_pages)
        self._packed = gpu.pinned(4 * size).view(np.int32)
        width = min(MAX_BRANCHES, plan.vocab_size) if self._nodes else 0
        self._guesses, self._branches = self._room(np.int32), self._room(np.int32, width)
        self._chances = self._room(np.float32, width)
        for number, bucket in enumerate(plan.buckets):
            part = NEXT if bucket.max_query == 1 else FIRST
            for how in (GREEDY, BRANCHES) if self._nodes else (GREEDY,):
                if part in bucket.parts:
                    self._graphs.capture(number, part, "body", "head", how)

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
        num_tokens, longest_share = self._first(samples)
        if num_tokens > self._most_tokens:
            return None
        self._catch_up(batch)
        wanted = batch.num_ahead[works]
        nums, trees = np.minimum(wanted, self._most), (wanted == self._nodes) & (self._nodes > 0)
        steps, num = int(nums.max()), len(works)
        longest = min(int(batch.inputs[names.KV_LEN][works].max()) + steps, plan.max_pages * plan.page_size)
        first = plan.bucket(num_tokens, num, longest, max_query=longest_share)
        later = plan.bucket(num, num, longest, max_query=1)
        self._guess(first, later, num, steps, BRANCHES if trees.any() else GREEDY)
        told = (part[:steps, :num] for part in (self._guesses, self._branches, self._chances))
        return Guesses(works.copy(), nums, trees, *told)

    def settle(self, batch: Batch, tokens: np.ndarray, guesses: Guesses | None) -> list[Sequence[int]] | None:
        """The step is done, and `tokens` [N] were sampled: the guesses of each work, and what is known of its rows."""
        works = batch.sample_works
        held = np.ones(len(works), bool) if batch.drafts is None else holding(tokens, batch.drafts, batch.nodes)
        holds = np.flatnonzero(held)
        last = holds[np.append(works[holds][1:] != works[holds][:-1], True)] if len(holds) else holds
        rows, newest = batch.sample_rows[last], batch.sample_positions[last]
        # what held last may have been a branch of a tree, of which there are no keys
        self._seen[rows] = np.minimum(self._seen[rows], newest - (batch.nodes is not None))
        if guesses is None:
            return None
        row_of, newest_of = np.zeros(batch.num_works, np.int64), np.zeros(batch.num_works, np.int64)
        row_of[works[last]], newest_of[works[last]] = rows, newest
        self._seen[row_of[guesses.works]] = self._seen_after(newest_of[guesses.works], len(guesses.tokens))
        found: list[Sequence[int]] = [[] for _ in range(batch.num_works)]
        columns, branches = self._tokens(guesses.tokens).T, self._tokens(guesses.branches)
        for i, work in enumerate(guesses.works.tolist()):
            if guesses.trees[i]:
                tree = self._tree(columns[i], branches[:, i], guesses.chances[:, i])
                found[work] = tree.keep([token < self._vocab_size for token in tree])
            else:
                chain = columns[i, : guesses.nums[i]].tolist()
                found[work] = chain[: next((j for j, t in enumerate(chain) if t >= self._vocab_size), len(chain))]
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

    def _first(self, samples: np.ndarray) -> tuple[int, int]:
        """(tokens of the first step, most of a sequence): of each the one sampled last and the one before, unseen."""
        return 2 * len(samples), 2

    def _guess(self, first: int, later: int, num: int, steps: int, how: str) -> None:
        """Enqueues `steps` steps for `num` sequences, in these buckets; what they say is there when they are done.

        how: GREEDY, or BRANCHES, whose steps tell the best tokens besides.
        """
        for i in range(steps):
            bucket, part = (later, NEXT) if i else (first, FIRST)
            self._graphs.replay(bucket, part, "body", "head", how)
            self._told(how, self._guesses[i, :num], self._branches[i, :num], self._chances[i, :num])

    def _tree(self, chain: np.ndarray, branches: np.ndarray, chances: np.ndarray) -> Tree:
        """What a work's guesses make: chain [D], branches and their chances [D, branches]."""
        return along(chain, branches, chances, self._nodes)

    def _tokens(self, guesses: np.ndarray) -> np.ndarray:
        """The target's tokens of guesses."""
        return guesses

    def _before_first(self, begins: np.ndarray, deepest: np.ndarray) -> np.ndarray:
        """Leading positions that the first step relies on, from those of the tokens that the first sample of each
        sequence follows, and of its last draft."""
        return deepest

    def _seen_after(self, newest: np.ndarray, steps: int) -> np.ndarray:
        """Leading positions whose keys are right if all guesses are, `newest` being that of the newest token."""
        return newest + steps

    # -- inside --------------------------------------------------------------------------------------------------------

    def _catch_up(self, batch: Batch) -> None:
        """Computes what it has not seen of the works to draft for, up to the token before the last of the step."""
        assert batch.ahead
        works, _, samples = batch.ahead.table
        kv_len, rows = batch.inputs[names.KV_LEN][works].astype(np.int64), batch.rows[works]
        deepest = np.maximum.reduceat(batch.inputs[names.POSITIONS], batch.inputs[names.QUERY_START][:-1])[works]
        begins, ends = self._seen[rows], self._before_first(kv_len - samples, deepest.astype(np.int64))
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

    def _told(self, how: str, *arrays: np.ndarray) -> None:
        """Enqueues copies of what a step says: its guesses and, with BRANCHES, the best tokens and their chances."""
        for name, array in zip((SAMPLED, "top_ids", "top_logprobs"), arrays, strict=True):
            if name == SAMPLED or how == BRANCHES:
                self._gpu.download(array, self._buffers[name], self._stream)

    def _room(self, dtype: type, *columns: int) -> np.ndarray:
        """[steps, rows, ..] for what is told of guesses."""
        return self._pinned(dtype, self._most, self.plan.max_num_seqs, *columns)

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
    needed = config.num_draft_tokens if engine.manifest.head else 1  # a head takes all samples of a step at once
    if plan.max_draft_tokens < needed:
        what = f" {config.num_draft_tokens} tokens" if plan.max_draft_tokens else ""
        raise EngineError(
            f"The draft engine {engine.folder} was built with --max-draft-tokens {plan.max_draft_tokens}, so it cannot"
            f" draft{what}; build it again with --max-draft-tokens {config.num_draft_tokens}."
        )
