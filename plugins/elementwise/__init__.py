"""The element-wise ONNX ops a decoder graph may still contain."""
