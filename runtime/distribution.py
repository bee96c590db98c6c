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
_CANDIDATES = 64  # sorted prefix that top_p looks at before it widens; a whole sort costs 25 times as much


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

    Repetition (Keskar et al., arXiv:1909.05858) over prompt and output; presence and frequency (OpenAI)
    over the output.
    """
    said = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | said, repeated, logits)
    return logits - frequency * counts - presence * said


def cutoffs(logits: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray) -> torch.Tensor:
    """The lowest logit that is kept, per row: logits [R, V] with maximum 0, options [R] (0, 1.0, 0.0: off) -> [R, 1].

    In vLLM's order: min_p of the best token's probability, then the top_k best, then of what is left the smallest set
    that holds top_p of its mass (Holtzman et al., arXiv:1904.09751).
    """
    vocab_size = logits.shape[1]
    with np.errstate(divide="ignore"):
        cut = torch.from_numpy(np.log(min_p)).to(logits).unsqueeze(1)  # [R, 1]
    largest_k = int(top_k.max())
    nucleus = bool((top_p < 1).any())
    if not largest_k and not nucleus:
        return cut
    width = min(vocab_size, max(largest_k, _CANDIDATES if nucleus else 1))
    ordered = logits.topk(width).values  # [R, width], best first
    if largest_k:
        k = np.where(top_k > 0, np.minimum(top_k, vocab_size), 0)
        index = torch.from_numpy(np.clip(k - 1, 0, width - 1).astype(np.int64)).unsqueeze(1)
        kth = ordered.gather(1, index.to(logits.device))
        cut = torch.where(torch.from_numpy(k > 0).unsqueeze(1).to(logits.device), torch.maximum(cut, kth), cut)
    if not nucleus:
        return cut
    p = torch.from_numpy(top_p.astype(np.float64)).unsqueeze(1).to(logits.device)
    mass = logits.exp().masked_fill_(logits < cut, 0).sum(-1, keepdim=True, dtype=torch.float64)
    while True:
        reached = ordered.exp().cumsum(-1, dtype=torch.float64) >= p * mass
        done = reached[:, -1:] | (ordered[:, -1:] <= cut) | (p >= 1)
        if width == vocab_size or bool(done.all()):
            break
        width = min(vocab_size, 8 * width)
        ordered = logits.topk(width).values
    last = reached.to(torch.int8).argmax(-1, keepdim=True)  # the first place where the mass is enough
    nucleus_cut = torch.where(reached[:, -1:] & (p < 1), ordered.gather(1, last), torch.full_like(cut, -math.inf))
    return torch.maximum(cut, nucleus_cut)


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
