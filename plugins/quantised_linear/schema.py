"""Declaration of `ingot::QuantisedLinear`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, int_attribute, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    x, weight = shape_of(context, 0), shape_of(context, 1)
    set_output(context, 0, int_attribute(context, "dtype"), x and weight and [*x[:-1], weight[0]])


SCHEMA = declare(
    "QuantisedLinear",
    "y = (x * x_scale) @ ((weight - zero) * scale)^T + bias, summed in fp32 and rounded once: what Linear computes "
    "between the DequantizeLinear nodes that `builder/passes/lowering.py` finds around it, without their rounding.",
    inputs=[
        ("x", "X", "[T, K], in 8 bits if there is an x_scale"),
        ("weight", "W", "[N, K]"),
        ("scale", "tensor(float)", "[N], or [N, ceil(K / group)]"),
        ("zero?", "W", "shape of scale, the weight's type"),
        ("x_scale?", "tensor(float)", "[] for all, [T, 1], or [T, ceil(K / x_group)]"),
        ("bias?", "T", "[N]"),
    ],
    outputs=[("y", "T", "[T, N]")],
    attributes=[
        ("dtype", "int", "ONNX data type of y"),
        ("group", 0, "columns of the weight that share a scale; 0: a whole row"),
        ("x_group", 0, "columns of x that share a scale; 0: all of a token"),
    ],
    infer=_infer,
)
