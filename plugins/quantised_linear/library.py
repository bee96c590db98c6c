"""QuantisedLinear in FP8 by cuBLASLt, where many rows share a weight: one tactic for each algorithm that it proposes.

It takes a factor for each row of x and of the weight (`OUTER_VEC_32F`) on compute capability 9.0 alone: cuBLAS 13
documentation, "Outer vector scaling for FP8 data types".
"""

from ..cublas import MOST, WORKSPACE
from ..linear.library import FEWEST_ROWS
from ..tactic import Gemm, Launch, Operand, Site, Tactic

CAPABILITY = 90
MULTIPLE = 16  # of width and depth, in which cuBLASLt counts FP8


def fp8_products(site: Site) -> list[Tactic]:
    """[] where not both sides are FP8 with a factor for each row."""
    x, weight, _, zero, x_scale, bias = site.inputs
    assert x is not None and weight is not None
    (rows, depth), width = x.shape, weight.shape[0]
    fp8 = x.dtype == weight.dtype == "float8_e4m3fn" and zero is None and x_scale is not None
    rowwise = fp8 and x_scale is not None and bool(x_scale.shape)
    rowwise = rowwise and not site.attributes["group"] and not site.attributes["x_group"]
    fits = rows > FEWEST_ROWS and not width % MULTIPLE and not depth % MULTIPLE
    if not (rowwise and fits and site.device.cublas and site.device.capability == CAPABILITY):
        return []
    arguments = (Operand("input", 0), Operand("input", 1), Operand("input", 5 if bias else 1), Operand("output", 0),
                 Operand("workspace", 0), Operand("input", 4), Operand("input", 2))  # fmt: skip
    return [
        Tactic(f"cublas {rank}", (Launch(gemm, (1, 1, 1), arguments),), WORKSPACE)
        for rank in range(MOST)
        for gemm in [Gemm(rows, width, depth, x.dtype, bias is not None, rank, site.outputs[0].dtype)]
    ]
