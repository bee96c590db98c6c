"""Declaration of `ingot::QuantiseTokens`."""

from onnx import TensorProto
from onnx.shape_inference import InferenceContext

from ..opschema import declare, int_attribute, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    shape, group = shape_of(context, 0), int_attribute(context, "group")
    set_output(context, 0, int_attribute(context, "dtype"), shape)
    if shape is None:
        return
    groups = 1 if not group else -(-shape[1] // group) if isinstance(shape[1], int) else None
    set_output(context, 1, TensorProto.FLOAT, [shape[0], groups])


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
