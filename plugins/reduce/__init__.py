"""ONNX ops over the last axis: Softmax, ReduceSum, TopK, LayerNormalization."""
