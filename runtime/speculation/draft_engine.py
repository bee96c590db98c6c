"""A second, smaller engine that guesses what the target will say, run by the target's executor in its own thread.

Its KV cache has the target's pages: the token in slot s of the target has slot s here, so prefix hits, preemption and
rows are the scheduler's work alone. It may lag behind: when drafts are wanted for a row, what it has not seen yet is
computed first. Nothing here bears on what is sampled: a wrong guess costs time, never an answer.

Guesses are a chain of the likeliest tokens, or a tree that grows by depth: the likeliest nodes of a level, by the
chance of their whole paths, are run together, each seeing its own path; of all that follows from them the best are kept
(EAGLE-2, arXiv:2406.16858). What was run for a tree is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ...engines import step as names
from ...engines.errors import EngineError
from ...engines.sampling import MAX_BRANCHES
from ..batch import Batch
from ..engine import Engine
from .costs import run_of_level, scratch_step
from .tree import Growth, Tree, bits
from .verify import holding, newest

if TYPE_CHECKING:
    import torch  # which engines for a GPU are served without

    Graph = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class DraftEngine:
    """Drafts greedily for all rows of a batch at once. Used by the executor's thread, in the order of its steps.

    graph, pools: of the draft engine, the pools with as many pages as the target's. vocab_size: the target's.
    max_tokens: of a step, where a row has much to catch up with. depth, nodes: of a tree; a row for which so many nodes
    are wanted gets one.
    """

    lag = 0  # positions at a row's end whose KV is not made before the tokens behind them are known

    def __init__(
        self, graph: Graph, pools: Mapping[str, torch.Tensor], num_rows: int, num_pages: int, page_size: int,
        vocab_size: int, max_tokens: int, depth: int, nodes: int,
    ):  # fmt: skip
        self.graph, self.pools = graph, dict(pools)
        self._page_size, self._vocab_size, self._max_tokens = page_size, vocab_size, max_tokens
        self._depth, self._nodes = depth, nodes
        self._token = np.zeros(num_pages * page_size, np.int32)  # in each slot, as the target or a draft put it there
        self._whole = np.zeros(num_pages, bool)  # pages that are full here, too: a prefix hit finds them
        self._seen = np.zeros(num_rows, np.int64)  # leading positions of a row whose KV is right

    def follow(self, batch: Batch) -> None:
        """The target runs this step; its tokens in flight have been filled in."""
        inputs = batch.inputs
        slots, positions, starts = inputs[names.SLOTS], inputs[names.POSITIONS], inputs[names.QUERY_START]
        self._token[slots] = inputs[names.TOKENS]
        self._whole[slots[slots % self._page_size == 0] // self._page_size] = False
        for placement in batch.placements:
            work = int(np.flatnonzero(batch.rows == placement.row)[0])
            found = self._whole[inputs[names.PAGES][work, : positions[starts[work]] // self._page_size]]
            num = len(found) if found.all() else int(found.argmin())
            self._seen[placement.row] = max(0, num * self._page_size - self.lag)

    def keep(self, batch: Batch, outputs: Mapping[str, torch.Tensor]) -> None:
        """The target ran the step and its graph gave this. A draft engine reads nothing but tokens."""

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """The target's tokens of these slots [M] are in those now."""
        self._token[target] = self._token[source]

    def time(self, size: int) -> None:
        """Runs a step of `size` sequences for its time."""
        self.graph(scratch_step(size, 4) | self.pools)

    def draft(self, batch: Batch, tokens: np.ndarray) -> list[Sequence[int]] | None:
        """Guesses after the step's tokens [N], `num_ahead` for each work; None where none are wanted."""
        works = batch.sample_works
        last = newest(works, holding(tokens, batch.drafts, batch.nodes))
        works, rows, ends = works[last], batch.sample_rows[last], batch.sample_positions[last] + 1
        self._seen[rows] = np.minimum(self._seen[rows], ends - 1)
        if batch.num_ahead is None:
            return None
        drafts: list[Sequence[int]] = [[] for _ in range(batch.num_works)]
        wanted = np.flatnonzero(batch.num_ahead[works] > 0)
        if len(wanted):
            works, rows, ends = works[wanted], rows[wanted], ends[wanted]
            guesses = self._guess(
                batch.inputs[names.PAGES][works], rows, ends, tokens[last[wanted]], batch.num_ahead[works]
            )
            for work, some in zip(works.tolist(), guesses, strict=True):
                drafts[work] = some
        return drafts

    def _guess(
        self, pages: np.ndarray, rows: np.ndarray, ends: np.ndarray, tokens: np.ndarray, nums: np.ndarray
    ) -> list[Sequence[int]]:
        """pages [S, P], rows [S], lengths with the newest token [S], that token [S], guesses wanted [S]."""
        begins, stops = self._seen[rows], ends - self.lag
        self._put(pages, ends - 1, tokens)
        while int((stops - 1 - begins).sum()) > self._max_tokens:
            left = np.cumsum(stops - 1 - begins)
            counts = np.diff(np.minimum(left, self._max_tokens), prepend=0)
            some = counts > 0
            self._run(pages[some], begins[some], counts[some])
            begins += counts
        full = (ends - 1) // self._page_size  # pages of tokens that stay
        self._whole[pages[np.arange(pages.shape[1]) < full[:, None]]] = True
        logits, state = self._run(pages, begins, stops - begins)
        trees = self._wants_tree(nums)
        nums = np.where(trees, 1, np.minimum(nums, self._depth))
        guesses: list[Sequence[int]] = [[] for _ in rows]
        for guess, mine in ((self._chains, np.flatnonzero(~trees)), (self._trees, np.flatnonzero(trees))):
            if len(mine):
                known = logits[mine], None if state is None else state[mine]
                for row, found in zip(mine, guess(pages[mine], ends[mine], nums[mine], *known), strict=True):
                    guesses[row] = found
        self._seen[rows] = self._seen_after(ends, nums)
        return guesses

    def _wants_tree(self, nums: np.ndarray) -> np.ndarray:
        return np.asarray((nums == self._nodes) & (nums > self._depth))

    def _seen_after(self, ends: np.ndarray, nums: np.ndarray) -> np.ndarray:
        """Leading positions whose KV is right if all guesses are."""
        return ends - 1 + nums

    def _chains(
        self, pages: np.ndarray, ends: np.ndarray, nums: np.ndarray, logits: torch.Tensor, state: torch.Tensor | None
    ) -> list[list[int]]:
        """As `_guess`; logits [S, V] and state [S, width] of the newest tokens."""
        guesses: list[list[int]] = [[] for _ in ends]
        alive = np.arange(len(ends))
        for i in range(int(nums.max())):
            if i:
                logits, state = self._run(pages[alive], ends[alive] - self.lag + i - 1, np.ones_like(alive), state)
            found = self._likeliest(logits)
            for row, token in zip(alive.tolist(), found.tolist(), strict=True):
                guesses[row].append(token)
            goes_on = nums[alive] > i + 1
            alive, found, state = alive[goes_on], found[goes_on], None if state is None else state[goes_on]
            self._put(pages[alive], ends[alive] + i, found)
        return guesses

    def _trees(
        self, pages: np.ndarray, ends: np.ndarray, nums: np.ndarray, logits: torch.Tensor, state: torch.Tensor | None
    ) -> list[Tree]:
        """As `_chains`. What is run lies, level behind level, in the slots that the target's drafts will have."""
        size, num = len(ends), run_of_level(self._nodes, self._depth)
        chances, tokens = self._best(logits)  # [S, nodes of a level]
        growth, branches = Growth(tokens, chances), tokens.shape[1]
        paths = np.zeros((size, 1), np.uint64)  # of each parent: a bit for each node that was run
        for depth in range(1, self._depth):
            run = growth.going_on(num)  # [S, num]
            parent, done, num = run // branches, (depth - 1) * run.shape[1], run.shape[1]
            own = np.uint64(1) << np.arange(done, done + num, dtype=np.uint64)
            paths = np.take_along_axis(paths, parent, 1) | own
            if state is not None:
                at = (parent + np.arange(size)[:, None] * (len(state) // size)).reshape(-1)
                state = state[at]
            logits, state = self._run_level(
                pages, ends - self.lag + done, ends - self.lag - 1 + depth, growth.tokens(run), bits(paths, done + num),
                state,
            )  # fmt: skip
            after, found = self._best(logits)  # [S * num, branches]
            branches = found.shape[1]
            growth.add(run, found.reshape(size, num, -1), after.reshape(size, num, -1))
        return growth.trees(self._nodes)

    def _run_level(
        self, pages: np.ndarray, begins: np.ndarray, positions: np.ndarray, tokens: np.ndarray, ancestors: np.ndarray,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Nodes [S, n] of one depth, whose position [S] they have, as keys from `begins` [S] on; ancestors [S, n]."""
        size, num = tokens.shape
        keys = begins[:, None] + np.arange(num)
        slots = self._slots(np.take_along_axis(pages, keys // self._page_size, 1), keys)
        more = {names.ANCESTORS: ancestors.reshape(-1)}
        return self._forward(
            pages, tokens.reshape(-1), np.repeat(positions, num), slots.reshape(-1), np.arange(size + 1) * num,
            begins + num, np.arange(size * num), state, more,
        )  # fmt: skip

    def _run(
        self, pages: np.ndarray, begins: np.ndarray, counts: np.ndarray, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step over positions `begin .. begin + count` of each sequence -> logits after each [S, V], and what the
        next step is to have as `state` [S, width], which a head goes on from."""
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        sequences = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(query_start[-1]) + np.repeat(begins - query_start[:-1], counts)
        slots = self._slots(pages[sequences, positions // self._page_size], positions)
        read = slots
        if self.lag:
            read = self._slots(pages[sequences, (positions + self.lag) // self._page_size], positions + self.lag)
        return self._forward(
            pages, self._token[read], positions, slots, query_start, begins + counts, query_start[1:] - 1, state
        )

    def _forward(
        self, pages: np.ndarray, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, query_start: np.ndarray,
        kv_len: np.ndarray, logit_rows: np.ndarray, state: torch.Tensor | None,
        more: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        import torch

        arrays = {
            names.TOKENS: tokens, names.POSITIONS: positions, names.SLOTS: slots, names.QUERY_START: query_start,
            names.KV_LEN: kv_len, names.PAGES: pages[:, : -(-int(kv_len.max()) // self._page_size)],
            names.LOGIT_ROWS: logit_rows, **more,
        }  # fmt: skip
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array, np.int32)) for name, array in arrays.items()}
        outputs = self.graph({**inputs, **self._beside(slots, state), **self.pools})
        return outputs[names.LOGITS], outputs.get(names.HIDDEN)

    def _beside(self, slots: np.ndarray, state: torch.Tensor | None) -> Mapping[str, torch.Tensor]:
        """What the graph reads besides."""
        return {}

    def _likeliest(self, logits: torch.Tensor) -> np.ndarray:
        return logits[:, : self._vocab_size].argmax(-1).numpy().astype(np.int32)

    def _best(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """[.., V] -> the best tokens [.., branches] and the logarithms of their chances."""
        found = logits[..., : self._vocab_size].float().log_softmax(-1)
        chances, tokens = found.topk(min(MAX_BRANCHES, found.shape[-1]))
        return chances.numpy(), tokens.numpy()

    def _put(self, pages: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> None:
        page = pages[np.arange(len(pages)), positions // self._page_size]
        self._token[self._slots(page, positions)] = tokens

    def _slots(self, page: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return page * self._page_size + positions % self._page_size


def check_pair(target: Engine, draft: Engine, max_len: int) -> None:
    """Raises EngineError where `draft` cannot guess for `target`, whose requests have at most `max_len` tokens."""
    name, model, wanted = draft.folder, draft.manifest.model, target.manifest.model
    if draft.manifest.target != target.manifest.target:
        raise EngineError(
            f"The draft engine {name} is for the {draft.manifest.target} target, {target.folder} for"
            f" {target.manifest.target}; build both for the same."
        )
    if (head := draft.manifest.head) is not None:
        model = replace(model, vocab_size=head.target_vocab_size)
    texts = [text.tokenizer.get_vocab() if (text := engine.text) else None for engine in (target, draft)]
    if model.vocab_size != wanted.vocab_size and (None in texts or texts[0] != texts[1]):
        raise EngineError(
            f"The draft engine {name} has a vocabulary of {model.vocab_size} tokens, {target.folder} one of"
            f" {wanted.vocab_size}; a draft model must have the target's tokenizer."
        )
    if None not in texts and texts[0] != texts[1]:
        ours, theirs = ({number: token for token, number in text.items()} for text in texts if text is not None)
        number = min(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        raise EngineError(
            f"The draft engine {name} has another tokenizer than {target.folder}: token {number} is"
            f" {theirs.get(number)!r} there and {ours.get(number)!r} here; a draft model must have the target's."
        )
    if model.max_model_len < max_len:
        raise EngineError(
            f"The draft engine {name} has {model.max_model_len} positions, but requests may have {max_len} tokens;"
            f" give max_model_len {model.max_model_len} or less, or another draft engine."
        )
