"""Linear by cuBLASLt, where many rows share a weight: one tactic for each algorithm that it proposes."""

from ..cublas import MOST, WORKSPACE
from ..tactic import Gemm, Launch, Operand, Site, Tactic

FEWEST_ROWS = 16  # below, kernels that only read the weight are faster: benchmarks/gpu_linear.py


def products(site: Site) -> list[Tactic]:
    """The algorithms in the order of cuBLASLt's own estimate; which there are only a GPU can say."""
    x, weight, bias = site.inputs
    assert x is not None and weight is not None
    operands = (Operand("input", 0), Operand("input", 1), Operand("input", 2 if bias else 1), Operand("output", 0))
    arguments = (*operands, Operand("workspace", 0))
    width, depth = weight.shape
    return [
        Tactic(f"cublas {rank}", (Launch(gemm, (1, 1, 1), arguments),), WORKSPACE)
        for rank in range(MOST)
        for gemm in [Gemm(x.shape[0], width, depth, x.dtype, bias is not None, rank)]
    ]
