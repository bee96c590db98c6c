"""What `Sample` computes, in plain torch: the logits after extras, the distribution over tokens, the draw, logprobs.

Truncation is a threshold on the adjusted logits, so tokens that tie with the last one kept are kept as well. The draw
adds Gumbel noise to the logits and takes the largest (Gumbel-max), the noise hashed from (seed, position, token) alone:
a row's token depends on its logits, request and position, not on the batch it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

IN_PROMPT = 1 << 30  # this bit of a count: the token is in the prompt. The bits below: how often it was put out
_WORD = 0xFFFFFFFF


def sample(
    logits: Tensor,
    sample_rows: Tensor,
    sample_positions: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    penalties: Tensor | None,
    counts: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    stop_ids: Tensor | None,
    min_length: Tensor | None,
    masks: Tensor | None,
    last_token: Tensor,
    step_tokens: Tensor | None = None,
    logit_rows: Tensor | None = None,
    ancestors: Tensor | None = None,
    *,
    num_logprobs: int = 0,
) -> tuple[Tensor, ...]:
    """The site's inputs in order (see kernel.py) -> tokens [R] int32, and with `num_logprobs` the four others.

    Writes `last_token` and, where a row uses penalties, `counts`. A padding row (negative) gets token -1.
    """
    live = (sample_rows >= 0).nonzero()[:, 0]
    rows, positions = sample_rows[live].long(), sample_positions[live]
    values = logits[live].float()
    depth, guesses = torch.zeros_like(rows), torch.full_like(rows, -1)
    before: list[list[int]] = [[] for _ in rows]  # the samples after whose tokens a draft is before each sample
    if step_tokens is not None:
        assert logit_rows is not None
        depth = torch.tensor([(rows[:i] == row).sum() for i, row in enumerate(rows)], device=rows.device).long()
        guesses = step_tokens[logit_rows[live]].long()
        seen = None if ancestors is None else ancestors[logit_rows[live]].tolist()
        before = [_path(i, int(num), seen) for i, num in enumerate(depth)]
    if penalties is not None:
        assert counts is not None and bias_ids is not None and bias_values is not None
        assert stop_ids is not None and min_length is not None and masks is not None
        put_out = counts[rows]
        for i, path in enumerate(before):
            drafts = guesses[path]
            put_out[i].index_add_(0, drafts, torch.ones_like(drafts, dtype=put_out.dtype))
        values = adjusted(
            values, positions, penalties[rows], put_out, bias_ids[rows], bias_values[rows], stop_ids[rows],
            min_length[rows], masks[rows + depth * len(last_token)],
        )  # fmt: skip
    race = values
    if temperature is not None:
        assert seed is not None
        heat = temperature[rows]
        race = values + heat.unsqueeze(1) * gumbel(seed[rows], positions, logits.shape[1])
        if top_k is not None:
            assert top_p is not None and min_p is not None
            race = race.masked_fill(~kept(values, heat, top_k[rows], top_p[rows], min_p[rows]), -torch.inf)
    chosen = race.argmax(-1)
    tokens = torch.full_like(sample_rows, -1)
    tokens[live] = chosen.int()
    for i, row in enumerate(rows.tolist()):  # a sample holds if the drafts before it are what was sampled there
        root = i - int(depth[i])
        path = [root, *before[i]]
        if any(chosen[parent] != guesses[node] for parent, node in zip(path, path[1:], strict=False)):
            continue
        if ancestors is None or not (rows == row).sum() > 1:
            last_token[row] = chosen[i]
        if penalties is not None and counts is not None and penalties[row].tolist() != [1.0, 0.0, 0.0]:
            counts[row, chosen[i]] += 1
    if not num_logprobs:
        return (tokens,)
    raw = logits.float()
    logprobs = raw.log_softmax(-1)
    at = tokens.long().clamp(min=0).unsqueeze(1)
    rank = (raw > raw.gather(1, at)).sum(-1) + 1
    ids = raw.sort(dim=-1, descending=True, stable=True).indices[:, :num_logprobs]  # the lowest id first among equals
    return tokens, logprobs.gather(1, at)[:, 0], rank.int(), ids.int(), logprobs.gather(1, ids)


def _path(i: int, depth: int, seen: list[int] | None) -> list[int]:
    """Of the samples of a request up to i, the first of which follows what is known, `depth` before it: those whose
    tokens are drafts that sample i's token sees, in order. seen: bits, the highest that is set a token's own."""
    if seen is None:
        return list(range(i - depth + 1, i + 1))
    own = (seen[i] & _WORD).bit_length() - 1
    return [i - back for back in range(depth - 1, -1, -1) if seen[i] >> (own - back) & 1]


def adjusted(
    logits: Tensor,
    positions: Tensor,
    penalties: Tensor,
    counts: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    stop_ids: Tensor,
    min_length: Tensor,
    masks: Tensor,
) -> Tensor:
    """Logits after masks, bias, min_tokens and penalties, all by row of the batch: logits [R, V] -> [R, V] fp32."""
    token = torch.arange(logits.shape[1], device=logits.device)
    values = logits.float().masked_fill((masks[:, token // 32] >> token % 32 & 1) == 0, -torch.inf)
    for i in range(len(values)):
        filled = bias_ids[i] >= 0
        values[i].index_add_(0, bias_ids[i][filled].long(), bias_values[i][filled])
        if positions[i] < min_length[i]:
            values[i, stop_ids[i][stop_ids[i] >= 0].long()] = -torch.inf
    repetition, presence, frequency = penalties.split(1, dim=1)
    times = counts & (IN_PROMPT - 1)
    values = torch.where(counts != 0, torch.where(values > 0, values / repetition, values * repetition), values)
    return values - frequency * times - presence * (times > 0)


def kept(values: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens may be drawn: adjusted logits [R, V], parameters [R] (0, 0, 1, 0: greedy and off) -> [R, V] bool.

    min_p of the best token's probability, then the top_k best, then of what is left the smallest set that holds top_p
    of its mass. A greedy row keeps all; nothing is drawn there.
    """
    heat = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    scaled = (values - values.amax(-1, keepdim=True)) / heat
    keep = scaled >= min_p.log().unsqueeze(1)
    order = values.sort(-1, descending=True).values
    some = (top_k > 0) & (top_k < values.shape[1])
    kth = order.gather(1, torch.where(some, top_k, values.shape[1]).long().unsqueeze(1) - 1)
    keep &= values >= kth
    mass = torch.where(keep, scaled, -torch.inf).double().exp()
    held = mass.sort(-1, descending=True).values.cumsum(-1)
    goal = top_p.double().unsqueeze(1) * held[:, -1:]
    last = (held < goal).sum(-1, keepdim=True).clamp(max=values.shape[1] - 1)  # index of the token that reaches it
    keep &= (values >= order.gather(1, last)) | (top_p >= 1).unsqueeze(1)
    return keep | (temperature <= 0).unsqueeze(1)


def probabilities(
    values: Tensor,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The chance of each token: adjusted logits [R, V], parameters [R] -> [R, V] float64."""
    heat = torch.where(temperature > 0, temperature, 1.0).double().unsqueeze(1)
    scaled = values.double() / heat
    if top_k is not None:
        assert top_p is not None and min_p is not None
        scaled = scaled.masked_fill(~kept(values, temperature, top_k, top_p, min_p), -torch.inf)
    best = torch.zeros_like(scaled).scatter_(1, values.argmax(-1, keepdim=True), 1.0)
    return torch.where(temperature.unsqueeze(1) > 0, scaled.softmax(-1), best)


def gumbel(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [R, V] fp32 of seed [R] int64 and positions [R].

    Word `token % 4` of Philox4x32-7 (Salmon et al., SC11) of counter (token // 4, position, 0, 0) and the seed as key.
    """
    groups = torch.arange((vocab_size + 3) // 4, device=seed.device).unsqueeze(0)
    c = [groups.expand(len(seed), -1), (positions.long() & _WORD).unsqueeze(1), groups * 0, groups * 0]
    k = [(seed & _WORD).unsqueeze(1), (seed >> 32 & _WORD).unsqueeze(1)]
    for _ in range(7):
        first, third = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # 64 bits that wrap: shifted and masked they are right
        c = [third >> 32 & _WORD ^ c[1] ^ k[0], third & _WORD, first >> 32 & _WORD ^ c[3] ^ k[1], first & _WORD]
        k = [k[0] + 0x9E3779B9 & _WORD, k[1] + 0xBB67AE85 & _WORD]
    words = torch.stack(torch.broadcast_tensors(*c), -1).flatten(1)[:, :vocab_size]
    uniform = ((words.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-uniform)).log().float()
