"""Declaration of `ingot::GatedLinear`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    x, weight = shape_of(context, 0), shape_of(context, 1)
    width = weight[0] // 2 if weight and isinstance(weight[0], int) else None
    set_output(context, 0, elem_type(context, 0), x and [*x[:-1], width])


SCHEMA = declare(
    "GatedLinear",
    "GatedActivation(Linear(x, weight, bias)); the product is rounded to the type of x before the activation.",
    inputs=[("x", "T", "[T, K]"), ("weight", "T", "[2*I, K], gates then ups"), ("bias?", "T", "[2*I]")],
    outputs=[("y", "T", "[T, I]")],
    attributes=[("activation", "string", "silu, gelu (erf), gelu_tanh or relu")],
    infer=_infer,
)
