"""Hidden states by slot, in plain torch."""

from collections.abc import Sequence

from torch import Tensor, cat


def keep_states(states: Tensor, slots: Tensor, pool: Tensor) -> None:
    """states [T, W], slots [T] int32 -> rows of pool [num_slots, W], in place; of equal slots any one stays."""
    pool[slots.long()] = states


def read_states(slots: Tensor, pools: Sequence[Tensor]) -> Tensor:
    """slots [T] int32, pools [num_slots, W] each -> [T, len(pools) * W]: the rows of all pools side by side."""
    return cat([pool[slots.long()] for pool in pools], -1)
