"""Declaration of `ingot::QuantisedRMSNorm`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, infer_quantised, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    infer_quantised(context, shape_of(context, 0))
    if context.get_num_outputs() > 2:
        set_output(context, 2, elem_type(context, 0), shape_of(context, 0))


SCHEMA = declare(
    "QuantisedRMSNorm",
    "QuantiseTokens(RMSNorm(x, weight, residual)): the norm is rounded to the type of x before it is quantised.",
    inputs=[("x", "T", "[T, D]"), ("weight", "T", "[D]"), ("residual?", "T", "[T, D]")],
    outputs=[
        ("values", "Q", "[T, D]"),
        ("scale", "tensor(float)", "[T, ceil(D / group)], or [T, 1]"),
        ("sum?", "T", "[T, D], only with a residual"),
    ],
    attributes=[
        ("dtype", "int", "ONNX data type of the values: INT8 or FLOAT8E4M3FN"),
        ("group", 0, "columns that share a scale; 0: all of a token"),
        ("epsilon", "float", "added to the mean square"),
        ("weight_offset", 0.0, "as RMSNorm's"),
        ("fp32_multiply", 0, "as RMSNorm's"),
    ],
    infer=_infer,
)
