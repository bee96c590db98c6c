"""Definition of `ingot::Experts` in torch: a loop over the experts that were hit."""

import torch

from ..few_shapes import in_few_shapes
from ..gated_activation.reference import activation_function


def experts(
    x: torch.Tensor,
    expert_index: torch.Tensor,
    expert_weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    activation: str,
    transposed: int = 0,
    interleaved: int = 0,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> torch.Tensor:
    """x [T, K], expert_index and expert_weight [T, k], gate_up [E, 2*I, K], down [E, K, I] -> [T, K]."""
    total = x.new_zeros(x.shape, dtype=torch.float32)
    for expert in expert_index.unique().tolist():
        if not 0 <= expert < gate_up.shape[0]:
            continue
        rows, choice = torch.where(expert_index == expert)  # tokens that chose it, and as which of their k
        h = _project(x[rows], gate_up, gate_up_bias, expert, transposed)  # [n, 2*I]
        gate, up = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        if activation == "swiglu_oai":
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            h = (up + 1) * (gate * torch.sigmoid(gate * alpha))
        else:
            h = activation_function(activation)(gate) * up
        h = _project(h, down, down_bias, expert, transposed)  # [n, K]
        total.index_add_(0, rows, (h * expert_weight[rows, choice, None]).float())
    return total.to(x.dtype)


def _project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int, transposed: int
) -> torch.Tensor:
    matrix = weight[expert] if transposed else weight[expert].t()
    y = in_few_shapes(lambda x: x @ matrix, x)
    return y if bias is None else y + bias[expert]
