"""Declaration of `ingot::QuantisedGatedActivation`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, infer_quantised, shape_of


def _infer(context: InferenceContext) -> None:
    shape = shape_of(context, 0)
    infer_quantised(context, shape and [shape[0], shape[1] // 2 if isinstance(shape[1], int) else None])


SCHEMA = declare(
    "QuantisedGatedActivation",
    "QuantiseTokens(GatedActivation(x)): the product is rounded to the type of x before it is quantised.",
    inputs=[("x", "T", "[T, 2*I], gate then up")],
    outputs=[("values", "Q", "[T, I]"), ("scale", "tensor(float)", "[T, ceil(I / group)], or [T, 1]")],
    attributes=[
        ("activation", "string", "silu, gelu (erf), gelu_tanh or relu"),
        ("dtype", "int", "ONNX data type of the values: INT8 or FLOAT8E4M3FN"),
        ("group", 0, "columns that share a scale; 0: all of a token"),
    ],
    infer=_infer,
)
