"""Definition of `ingot::GatedActivation` in torch, and the activation functions by name."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...engines.errors import EngineError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of that name. Raises EngineError for a name that is not in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise EngineError(f"the graph asks for the activation '{name}', expected one of {known}; rebuild the engine")
    return ACTIVATIONS[name]


def gated_activation(x: torch.Tensor, *, activation: str) -> torch.Tensor:
    """x [T, 2*I] (gate, then up) -> act(gate) * up [T, I]."""
    gate, up = x.chunk(2, -1)
    return activation_function(activation)(gate) * up
