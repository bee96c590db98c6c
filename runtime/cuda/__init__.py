"""Serving on an NVIDIA GPU: the plan's launches as CUDA graphs, through cuda-python and nothing else."""
