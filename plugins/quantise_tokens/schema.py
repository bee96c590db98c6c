"""Declaration of `ingot::QuantiseTokens`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, infer_quantised, shape_of


def _infer(context: InferenceContext) -> None:
    infer_quantised(context, shape_of(context, 0))


SCHEMA = declare(
    "QuantiseTokens",
    "Quantises each token, or each group of its columns, so that its largest magnitude m is covered: scale = m / 448 "
    "for FP8 (E4M3), m / 127.5 for INT8, 1 where m is 0; values = x / scale, rounded to the nearest, ties to even, and "
    "saturated. What DequantizeLinear with axis 1 and a block_size of the group (K without one) takes back.",
    inputs=[("x", "T", "[T, K]")],
    outputs=[("values", "Q", "[T, K]"), ("scale", "tensor(float)", "[T, ceil(K / group)], or [T, 1] without groups")],
    attributes=[
        ("dtype", "int", "ONNX data type of the values: INT8 or FLOAT8E4M3FN"),
        ("group", 0, "columns that share a scale; 0: all of a token"),
    ],
    infer=_infer,
)
