"""ONNX `Gather` over axis 0: embedding tables, and the rows whose logits are wanted."""
