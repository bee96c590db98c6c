"""Declaration of `ingot::Linear`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    x, weight = shape_of(context, 0), shape_of(context, 1)
    set_output(context, 0, elem_type(context, 0), x and weight and [*x[:-1], weight[0]])


SCHEMA = declare(
    "Linear",
    "y = x @ weight^T + bias, the weight in the layout checkpoints store.",
    inputs=[("x", "T", "[T, K]"), ("weight", "T", "[N, K]"), ("bias?", "T", "[N]")],
    outputs=[("y", "T", "[T, N]")],
    infer=_infer,
)
