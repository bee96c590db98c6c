"""From logits to one token a row: penalties, truncation and the draw, as plain functions over a batch.

Truncation is a threshold on the logits, so tokens that tie with the last one kept are kept as well; the result does not
depend on how a sort breaks ties, which reduced precision makes common. The draw inverts the cumulative distribution at
one uniform number, hashed from (seed, position): it is the same in any row, batch and schedule.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

_BLOCK = 64  # a draw first picks a block, then a token in it: 32 rows of 4096 take 0.1 ms, one long cumsum 0.5 ms
_NUCLEUS = 64  # best tokens that top_p looks at before it sorts: 32 rows of 4096 take 0.6 ms, sorting them 1.4 ms


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """seeds [R] uint64, positions [R] -> [R] float64 in [0, 1): SplitMix64's finaliser (Steele et al., 2014), twice."""
    x = _mix(_mix(seeds) ^ (positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)))
    return (x >> np.uint64(12)) * 2.0**-52  # 52 bits: u * total rounds to less than the total


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def penalise(
    logits: torch.Tensor,
    in_prompt: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """logits, in_prompt (bool), counts (of the output) [R, V]; penalties [R, 1] -> [R, V].

    Repetition (Keskar et al., arXiv:1909.05858) over prompt and output; presence and frequency (OpenAI) over the
    output. One that no row uses costs nothing.
    """
    said = counts > 0
    if bool((repetition != 1).any()):
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(in_prompt | said, repeated, logits)
    if bool(frequency.any()):
        logits = logits - frequency * counts
    if bool(presence.any()):
        logits = logits - presence * said
    return logits


def cutoffs(
    logits: torch.Tensor, weights: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
) -> torch.Tensor:
    """The lowest logit that is kept: logits [R, V] with maximum 0, their exp, options [R] (0, 1, 0: off) -> [R, 1].

    In vLLM's order: min_p of the best token's probability, then the top_k best, then of what is left the smallest set
    that holds top_p of its mass (Holtzman et al., arXiv:1904.09751).
    """
    vocab_size = logits.shape[1]
    with np.errstate(divide="ignore"):
        cut = torch.from_numpy(np.log(min_p)).to(logits).unsqueeze(1)  # [R, 1]
    top_k = np.where(top_k < vocab_size, top_k, 0)
    nucleus = np.flatnonzero(top_p < 1)
    width = max(int(top_k.max()), min(_NUCLEUS, vocab_size) if len(nucleus) else 0)
    if not width:
        return cut
    best = _best(logits, width)  # [R, width]
    if top_k.any():
        kth = best.gather(1, torch.from_numpy(np.maximum(top_k, 1).astype(np.int64) - 1).unsqueeze(1))
        cut = torch.where(torch.from_numpy(top_k > 0).unsqueeze(1), torch.maximum(cut, kth), cut)
    if len(nucleus):
        if len(nucleus) < len(logits):
            logits, weights, best = logits[nucleus], weights[nucleus], best[nucleus]
        floor = cut[nucleus]
        goal = torch.where(logits < floor, 0, weights).sum(-1, keepdim=True, dtype=torch.float64)
        goal *= torch.from_numpy(top_p[nucleus]).unsqueeze(1)
        settled, lowest = _nucleus(best, floor, goal)
        cut[nucleus] = torch.maximum(floor, lowest)
        if not settled.all():  # most nuclei are small: a whole sort is for the rows that need it
            rest = np.flatnonzero(~settled)
            _, lowest = _nucleus(_best(logits[rest], vocab_size), floor[rest], goal[rest])
            cut[nucleus[rest]] = torch.maximum(floor[rest], lowest)
    return cut


def _best(logits: torch.Tensor, width: int) -> torch.Tensor:
    """The largest logits in descending order: [R, V] -> [R, width]."""
    if width > logits.shape[1] // 8:  # numpy's vectorised sort of all costs what torch's topk of an eighth does
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)[:, ::-1][:, :width].copy())
    return logits.topk(width).values


def _nucleus(best: torch.Tensor, floor: torch.Tensor, goal: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Which rows reach their `goal` of mass within `best` [R], and the logit at which they do [R, 1] (-inf if not)."""
    reached = best.exp().cumsum(-1, dtype=torch.float64) >= goal  # [R, width]
    first = reached.to(torch.int8).argmax(-1, keepdim=True)
    lowest = torch.where(reached[:, -1:], best.gather(1, first), torch.full_like(floor, -math.inf))
    settled = reached[:, -1] | (best[:, -1] <= floor[:, 0])  # or all that is left ties with the floor, or is below it
    return settled.numpy(), lowest


def draw(weights: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """One index per row, with a chance in proportion to its weight: weights [R, V] >= 0, uniform [R] -> [R] int64."""
    num_rows, vocab_size = weights.shape
    if vocab_size % _BLOCK:
        weights = F.pad(weights, (0, -vocab_size % _BLOCK))
    blocks = weights.view(num_rows, -1, _BLOCK)  # [R, V / 64, 64]
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [R, V / 64]
    target = torch.from_numpy(uniform).to(weights.device).unsqueeze(1) * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True)  # [R, 1]; right: a block of weight 0 is never picked
    begin = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), torch.zeros_like(target))
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    within = torch.searchsorted(inside, target - begin, right=True)
    heaviest = (inside < inside[:, -1:]).sum(-1, keepdim=True)  # last index of weight > 0: rounding may point past it
    return (block * _BLOCK + torch.minimum(within, heaviest)).squeeze(1)
