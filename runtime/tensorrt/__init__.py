"""The tensorrt target's executor: TensorRT runs the graph, ingot's kernels spread the step and sample."""
