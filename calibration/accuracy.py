"""How much worse a quantised model is: perplexity, KL divergence and top-1 agreement on text that it has not seen.

Not one figure, since each misses something: perplexity forgives errors that cancel, KL does not; agreement is what a
greedy reader sees; errors by layer say where to spend more bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .recipe import Recipe

ROWS = 256  # whose probabilities over the vocabulary are in memory at a time


@dataclass(frozen=True)
class Layer:
    """A quantised weight. error: of its outputs, root mean square over that of the outputs, inputs as they came."""

    name: str
    format: str
    error: float


@dataclass(frozen=True)
class Accuracy:
    """Of a quantised model against itself before, over `num_tokens` predictions."""

    num_tokens: int
    perplexity_before: float
    perplexity: float
    kl: float  # nats a token, of the quantised distribution from the one before
    top1: float  # share of tokens whose likeliest continuation is the same
    layers: tuple[Layer, ...] = ()

    @property
    def rise(self) -> float:
        """Of the perplexity, as a share of what it was."""
        return self.perplexity / self.perplexity_before - 1

    def passes(self, recipe: Recipe) -> bool:
        return self.rise <= recipe.perplexity  # false for NaN

    def worst(self, num: int = 5) -> list[Layer]:
        """The layers with the largest errors, the largest first."""
        return sorted(self.layers, key=lambda layer: -layer.error)[:num]

    def table(self) -> str:
        """In a few lines, for a terminal or an error."""
        lines = [
            f"perplexity {self.perplexity_before:.4f} -> {self.perplexity:.4f} ({100 * self.rise:+.2f}%), "
            f"KL {self.kl:.5f} nats, top-1 agreement {100 * self.top1:.2f}% over {self.num_tokens} tokens"
        ]
        width = max((len(layer.name) for layer in self.worst()), default=0)
        lines += [f"  {layer.name:{width}}  {layer.format}  error {layer.error:.4f}" for layer in self.worst()]
        return "\n".join(lines)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Accuracy:
        """What `describe` gave. Raises ValueError, TypeError or KeyError: it is something else."""
        found = cls(**{**described, "layers": tuple(Layer(**layer) for layer in described["layers"])})
        figures = found.num_tokens, found.perplexity_before, found.perplexity, found.kl, found.top1
        numbers = (*figures, *(layer.error for layer in found.layers))
        if not all(type(x) is float or (type(x) is int and abs(x) < 1 << 53) for x in numbers):
            raise ValueError("the accuracy has a figure that is no number")
        if found.perplexity_before == 0:
            raise ValueError("the accuracy has the perplexity 0")
        return found


def compare(before: Iterable[torch.Tensor], after: Iterable[torch.Tensor], tokens: Iterable[torch.Tensor]) -> Accuracy:
    """before, after: logits [B * W, V] of each batch, asked for one by one. tokens: [B, W], what was read; row t
    predicts token t + 1."""
    num, losses, kl, same = 0, [0.0, 0.0], 0.0, 0
    for old, new, windows in zip(before, after, tokens, strict=True):
        batch, width = windows.shape
        keep = torch.arange(batch * width).view(batch, width)[:, :-1].flatten()
        targets = windows[:, 1:].flatten().long()
        for at in range(0, len(keep), ROWS):
            rows, wanted = keep[at : at + ROWS], targets[at : at + ROWS]
            p, q = (F.log_softmax(logits[rows].float(), -1) for logits in (old, new))
            losses = [total + float(F.nll_loss(x, wanted, reduction="sum"))
                      for total, x in zip(losses, (p, q), strict=True)]  # fmt: skip
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            num += len(rows)
    first, second = (math.exp(min(loss / num, 700.0)) for loss in losses)
    return Accuracy(num, first, second, kl / num, same / num)


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL divergence of logits after from those before, [T, V], in nats, the mean of all rows."""
    total = 0.0
    for old, new in zip(before.split(ROWS), after.split(ROWS), strict=True):
        p, q = F.log_softmax(old.float(), -1), F.log_softmax(new.float(), -1)
        total += float((p.exp() * (p - q)).sum())
    return total / len(before)
