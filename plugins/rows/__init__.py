"""Rows copied: side by side (ONNX `Concat`), the hidden states that heads read into and out of pools by slot, and rows
of pools to where a chain of drafts would lie (`runtime/speculation/tree.py`).

`KeepStates`, `ReadStates` and `MoveRows` are no ONNX ops: the planner puts them behind the body of a target, in front
of that of a head, and between steps. `reference.py` is their definition in torch.
"""

from .reference import keep_states, move_rows, read_states

__all__ = ["keep_states", "move_rows", "read_states"]
