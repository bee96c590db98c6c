"""The packed arrays of a step, spread over the step tensors of a bucket: how a plan begins. No op of a graph."""
