"""`Grow`: the step in which a drafter runs the next level of trees, made on the GPU from what it said of the last one.

No ONNX op: it stands in the place of staging, as `Draft` does. `kernel.py` says what goes in and out; what is chosen is
what `runtime/speculation/tree.py: Growth` chooses.
"""
