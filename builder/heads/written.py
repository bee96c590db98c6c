"""Text that the target writes itself: what a head drafts for, where text of others is only what prompts are like.

Heads trained on it agree with the target more often (EAGLE-3, arXiv:2503.01840, trains on the target's own answers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = {"cpu": 64, "cuda": 2048}  # windows: a step of few costs as much as one of many, their KV cache takes room


def kept(width: int) -> int:
    """Tokens of a window that stay: a quarter, as the prompt."""
    return max(1, width // 4)


@torch.no_grad()  # not in inference mode, of which nothing can be learnt from
def go_on(target: Any, windows: Tensor) -> Tensor:
    """windows [N, W] -> the same, with all behind `kept` replaced by what the target goes on with, greedily.

    An end of text does not end it.
    """
    width, found = windows.shape[1], windows.clone()
    for part in found.split(AT_ONCE[windows.device.type]):
        cache, step = None, part[:, : kept(width)]
        for at in range(kept(width), width):
            output = target(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            step = output.logits[:, -1:].argmax(-1)
            part[:, at] = step[:, 0]
    return found
