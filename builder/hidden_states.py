"""Which hidden states a target gives to heads that draft from them: decided when it is built, since a state behind the
last layer makes prompts dearer (its last MLP runs for every token) and each takes room in a plan's arena.

Numbered as transformers numbers them: i is what enters layer i, the number of layers what the final norm gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines.errors import BuildError, shown

if TYPE_CHECKING:
    from . import BuildConfig
    from .checkpoint import Checkpoint

EAGLE, EAGLE3, MEDUSA = "eagle", "eagle3", "medusa"


def read_by(kind: str, num_layers: int) -> tuple[int, ...]:
    """The hidden states that a head of the kind reads unless it says otherwise."""
    return (min(2, num_layers), num_layers // 2, max(0, num_layers - 3)) if kind == EAGLE3 else (num_layers,)


def check_target(target: str, what: str) -> None:
    """Raises BuildError for a target on which nothing is drafted from hidden states; `what` asks for it."""
    if target == "tensorrt":
        raise BuildError(
            f"{what} cannot be built for the tensorrt target; build for cuda or cpu, or without hidden states"
        )


def states_of(config: BuildConfig, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Those that `config.hidden_states` asks for, in ascending order. Raises BuildError: the model has none such."""
    if not config.hidden_states:
        return ()
    check_target(config.target, "a target of heads (--hidden-states)")
    num = checkpoint.config.get_text_config().num_hidden_layers
    if config.hidden_states in (EAGLE, EAGLE3, MEDUSA):
        return tuple(sorted(set(read_by(config.hidden_states, num))))
    return tuple(sorted(set(parse(config.hidden_states, num))))


def parse(text: str, num_layers: int) -> tuple[int, ...]:
    """Numbers with commas between. Raises BuildError: the model has none such."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) <= num_layers for part in parts):
        raise BuildError(
            f"the hidden states asked for are {shown(text)}; expected eagle, eagle3, medusa, or numbers "
            f"from 0 to {num_layers} with commas between"
        )
    return tuple(int(part) for part in parts)
