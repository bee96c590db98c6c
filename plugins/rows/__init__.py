"""Rows copied: side by side (ONNX `Concat`), and the hidden states that heads read into and out of pools by slot.

`KeepStates` and `ReadStates` are no ONNX ops: the planner puts them behind the body of a target and in front of that of
a head. `reference.py` is their definition in torch.
"""

from .reference import keep_states, read_states

__all__ = ["keep_states", "read_states"]
