"""Hidden states by slot, in plain torch."""

from collections.abc import Sequence

from torch import Tensor, cat


def keep_states(states: Tensor, slots: Tensor, pool: Tensor) -> None:
    """states [T, W], slots [T] int32 -> rows of pool [num_slots, W], in place; of equal slots any one stays."""
    pool[slots.long()] = states


def read_states(slots: Tensor, pools: Sequence[Tensor]) -> Tensor:
    """slots [T] int32, pools [num_slots, W] each -> [T, len(pools) * W]: the rows of all pools side by side."""
    return cat([pool[slots.long()] for pool in pools], -1)


def move_rows(pool: Tensor, moves: Tensor) -> None:
    """pool [num_slots, W] or [pages, page size, ..], in place: row moves[i, 0] over row moves[i, 1]; below 0: none."""
    source, target = moves[moves[:, 0] >= 0].long().unbind(1)
    rows = pool if pool.dim() == 2 else pool.flatten(0, 1)
    rows[target] = rows[source]
