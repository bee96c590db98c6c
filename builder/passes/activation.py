"""GELU by its tanh approximation, where a model writes it out (GPT-2's `gelu_new`), -> one Gelu.

Written out in 16 bits each step is rounded; as one op it is rounded once, so results differ in the last bits, to the
better.
"""

import math

import onnx_ir as ir
from onnxscript.rewriter import pattern

from .graph import scalar_of


class WrittenGelu(pattern.RewriteRuleClassBase):
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))."""

    def pattern(self, op, x, three, cubic, root, one, half):
        inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, three), cubic)), root)
        return op.Mul(op.Mul(x, half), op.Add(op.Tanh(inner), one))

    def check(self, context, x, three, cubic, root, one, half, **_):
        result = pattern.MatchResult()
        expected = ((three, 3.0), (cubic, 0.044715), (root, math.sqrt(2 / math.pi)), (one, 1.0), (half, 0.5))
        for value, number in expected:
            found = scalar_of(value)
            # constants are rounded to the activation type: 8 bits of mantissa in bfloat16
            if found is None or not math.isclose(found, number, rel_tol=2**-8):
                return result.fail("another constant", value)
        return result

    def rewrite(self, op, x, **_):
        return op.Gelu(x, approximate="tanh")


RULES = pattern.RewriteRuleSet([WrittenGelu.rule()])


def fuse_gelu(model: ir.Model) -> None:
    """The written-out tanh GELU -> Gelu."""
    RULES.apply_to_model(model)
