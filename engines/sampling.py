"""The buffers that sampling on a GPU works on: what the builder compiles for and the runtime allocates, by name.

A table has a row per row of the scheduler. Which of them a step needs depends on what its requests ask for; each kind
of sampling is compiled on its own, so that plain greedy steps pay for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKED = "packed"  # the step as the host packed it, int32
SAMPLE_ROWS = "sample_rows"  # [R] int32: the scheduler's row that a row of logits is sampled for, -1: none
SAMPLE_POSITIONS = "sample_positions"  # [R] int32: positions of the new tokens
MASKS = "masks"
# of what drafts trees, int32 but for the chances, see `plugins/grow` and `plugins/draft_head`
LEVEL, BASES, PARENTS, STATE_SLOTS = "level", "bases", "parents", "state_slots"
CHANCES, PATHS = "chances", "paths"
LAST_TOKEN = "last_token"  # [rows] int32: the token sampled last in each row

MAX_BIAS, MAX_STOP, MAX_LOGPROBS = 1024, 64, 20  # entries of one request
MAX_BRANCHES, MAX_LEVELS = 8, 16  # of a node of a tree of drafts, and nodes of a level that are run; of a tree

VOCABULARY, BITS = -1, -2  # columns: one for each token, or one for every 32
# name -> element type, columns (0: a vector)
TABLES: dict[str, tuple[str, int]] = {
    "temperature": ("float32", 0),
    "top_k": ("int32", 0),
    "top_p": ("float32", 0),
    "min_p": ("float32", 0),
    "seed": ("int64", 0),
    "penalties": ("float32", 3),
    "counts": ("int32", VOCABULARY),
    "bias_ids": ("int32", MAX_BIAS),
    "bias_values": ("float32", MAX_BIAS),
    "stop_ids": ("int32", MAX_STOP),
    "min_length": ("int32", 0),
    # a bit for each token, the lowest first: 0, it may not be sampled; all rows once more for each number of drafts
    # that may be before a sample
    MASKS: ("int32", BITS),
    LAST_TOKEN: ("int32", 0),
}
IN_PROMPT = 1 << 30  # this bit of a count: the token is in the prompt; the bits below: times in the output


def width(table: str, vocab_size: int) -> int:
    """Columns of a table, 0 for a vector."""
    columns = TABLES[table][1]
    return {VOCABULARY: vocab_size, BITS: -(-vocab_size // 32)}.get(columns, columns)


# outputs: name -> element type, columns by kind (0: a vector, 1: a column for each logprob)
SAMPLED = "sampled"
RESULTS: dict[str, tuple[str, int]] = {
    SAMPLED: ("int32", 0),
    "chosen_logprob": ("float32", 0),
    "chosen_rank": ("int32", 0),
    "top_ids": ("int32", 1),
    "top_logprobs": ("float32", 1),
}


@dataclass(frozen=True)
class Kind:
    """A way to sample: random draws, truncated ones, extras (masks, bias, min_tokens, penalties), log-probabilities."""

    random: bool = False
    truncate: bool = False
    extras: bool = False
    logprobs: bool = False

    @property
    def tables(self) -> frozenset[str]:
        """The tables it reads or writes."""
        names = {LAST_TOKEN}
        if self.random:
            names |= {"temperature", "seed"}
        if self.truncate:
            names |= {"top_k", "top_p", "min_p"}
        if self.extras:
            names |= {"penalties", "counts", "bias_ids", "bias_values", "stop_ids", "min_length", "masks"}
        return frozenset(names)

    @property
    def results(self) -> tuple[str, ...]:
        """The outputs it writes, in the order of the op."""
        return tuple(RESULTS) if self.logprobs else (SAMPLED,)

    def serves(self, other: Kind) -> bool:
        """Whether a step that needs `other` may be sampled this way."""
        return all(getattr(self, name) or not getattr(other, name) for name in self.__dataclass_fields__)


# from the cheapest; the last serves everything
KINDS: dict[str, Kind] = {
    "greedy": Kind(),
    "random": Kind(random=True),
    "truncated": Kind(random=True, truncate=True),
    "any": Kind(random=True, truncate=True, extras=True),
    "logprobs": Kind(random=True, truncate=True, extras=True, logprobs=True),
}
BRANCHES = Kind(logprobs=True)  # of drafts that are to be trees: the best MAX_BRANCHES of each row
