"""The packed arrays of a step, spread over the step tensors of a bucket. Not an op of a graph: a plan begins with it."""
