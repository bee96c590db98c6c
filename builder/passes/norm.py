"""`RMSNorm` of every family, LayerNormalization where it is written out, and the residual add before an RMSNorm.

What differs between families is where the value is rounded to the activation type and where the weight enters, and it
decides bits in bf16: Llama rounds, then multiplies; OLMo 2 and gpt-oss multiply in fp32; Gemma multiplies by 1 + w
in fp32. A norm computed in less than fp32 is left as it is.
"""

import onnx_ir as ir
from onnxscript.rewriter import pattern

from .graph import INGOT, dims, made_by, nodes, operand, replace, same_shape, scalar_of

FLOAT = ir.DataType.FLOAT


class NormRule(pattern.RewriteRuleClassBase):
    """A normalised value in fp32 times a weight; the kinds of norm say how it is written and what it becomes."""

    def check(self, context, x, weight, epsilon, normed, y, **_):
        result = pattern.MatchResult()
        if normed.dtype is not FLOAT:
            return result.fail("not computed in fp32", normed)
        if not isinstance(scalar_of(epsilon), float):
            return result.fail("epsilon is not a number", epsilon)
        if not weight.is_initializer() or dims(weight) != dims(x)[-1:]:
            return result.fail("the weight is not one per column", weight)
        if not (x.dtype == y.dtype == weight.dtype and same_shape(x, y)):
            return result.fail("input, weight and result are not of one type", y)
        return result


def mean_square_norm(op, x, epsilon):
    """x / sqrt(mean(x^2) + epsilon), of x in fp32."""
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))), _outputs=["normed"])


def in_fp32(op, x):
    return pattern.OrValue([op.Cast(x, to=int(FLOAT)), x])


class RoundThenScale(NormRule):
    """Llama: the normalised value is rounded, then multiplied by the weight."""

    def pattern(self, op, x, weight, epsilon):
        normed = mean_square_norm(op, in_fp32(op, x), epsilon)
        return op.Mul(pattern.OrValue([op.Cast(normed), normed]), weight, _outputs=["y"])

    def rewrite(self, op, x, weight, epsilon, **_):
        return op.RMSNorm(x, weight, epsilon=scalar_of(epsilon), _domain=INGOT)


class ScaleThenRound(NormRule):
    """OLMo 2, gpt-oss: multiplied by the weight in fp32, then rounded."""

    def pattern(self, op, x, weight, epsilon):
        normed = mean_square_norm(op, op.Cast(x, to=int(FLOAT)), epsilon)
        return op.Cast(op.Mul(normed, op.Cast(weight, to=int(FLOAT))), _outputs=["y"])

    def rewrite(self, op, x, weight, epsilon, **_):
        return op.RMSNorm(x, weight, epsilon=scalar_of(epsilon), fp32_multiply=1, _domain=INGOT)


class OffsetScale(NormRule):
    """Gemma: multiplied by 1 + weight in fp32, then rounded (with `rounded`) to a smaller type."""

    def __init__(self, rounded: bool):
        super().__init__(f"{type(self).__name__}(rounded={rounded})")
        self.rounded = rounded

    def pattern(self, op, x, weight, epsilon):
        normed = mean_square_norm(op, in_fp32(op, x), epsilon)
        scale = op.Add(in_fp32(op, weight), 1.0)
        if self.rounded:
            return op.Cast(op.Mul(normed, scale), _outputs=["y"])
        return op.Mul(normed, scale, _outputs=["y"])

    def rewrite(self, op, x, weight, epsilon, **_):
        return op.RMSNorm(x, weight, epsilon=scalar_of(epsilon), weight_offset=1.0, _domain=INGOT)


class WrittenLayerNorm(NormRule):
    """Cohere's LayerNorm without bias, written out: (x - mean) / sqrt(variance + epsilon) * weight, in fp32."""

    def __init__(self, rounded: bool):
        super().__init__(f"{type(self).__name__}(rounded={rounded})")
        self.rounded = rounded

    def pattern(self, op, x, weight, epsilon):
        h = in_fp32(op, x)
        centred = op.Sub(h, op.ReduceMean(h, [-1], keepdims=1))
        normed = mean_square_norm(op, centred, epsilon)
        scaled = op.Mul(normed, in_fp32(op, weight)) if self.rounded else None
        return op.Cast(scaled, _outputs=["y"]) if self.rounded else op.Mul(normed, weight, _outputs=["y"])

    def rewrite(self, op, x, weight, epsilon, **_):
        return op.LayerNormalization(x, weight, axis=-1, epsilon=scalar_of(epsilon), stash_type=1)


RULES = pattern.RewriteRuleSet(
    [
        OffsetScale.rule(rounded=True),
        WrittenLayerNorm.rule(rounded=True),
        ScaleThenRound.rule(),
        OffsetScale.rule(rounded=False),
        WrittenLayerNorm.rule(rounded=False),
        RoundThenScale.rule(),
    ]
)


def fuse_norm(model: ir.Model) -> None:
    """Every written-out norm -> one node. It acts on the last axis, so it may stand on any shape until it is 2-D."""
    RULES.apply_to_model(model)


def fuse_residual(model: ir.Model) -> None:
    """`s = a + b; RMSNorm(s)` -> `RMSNorm(a, residual=b)`, which also gives s to its other readers."""
    for node in nodes(model, "RMSNorm"):
        total = operand(node)
        add = made_by(total, "Add")
        if add is None or len(node.inputs) > 2:
            continue
        x, residual = operand(add), operand(add, 1)
        if not (same_shape(x, total) and same_shape(residual, total)):
            continue
        fused = ir.node("RMSNorm", [x, node.inputs[1], residual], node.attributes, domain=INGOT, num_outputs=2)
        for made, replaced in zip(fused.outputs, (node.outputs[0], total), strict=True):
            made.shape, made.type = replaced.shape, replaced.type
        model.graph.insert_before(add, fused)  # before every reader of the sum
        replace(node.outputs[0], fused.outputs[0])
        replace(total, fused.outputs[1])
