"""Declaration of `ingot::GatedQuantisedLinear`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, infer_quantised, int_attribute, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    x, weight = shape_of(context, 0), shape_of(context, 1)
    width = weight[0] // 2 if weight and isinstance(weight[0], int) else None
    shape = x and [*x[:-1], width]
    if int_attribute(context, "y_dtype"):
        infer_quantised(context, shape, "y_dtype", "y_group")
    else:
        set_output(context, 0, int_attribute(context, "dtype"), shape)


SCHEMA = declare(
    "GatedQuantisedLinear",
    "GatedActivation(QuantisedLinear(..)), and QuantiseTokens of it if y_dtype is given; each rounded to `dtype`.",
    inputs=[
        ("x", "X", "[T, K], in 8 bits if there is an x_scale"),
        ("weight", "W", "[2*I, K], gates then ups"),
        ("scale", "tensor(float)", "[2*I], or [2*I, ceil(K / group)]"),
        ("zero?", "W", "shape of scale, the weight's type"),
        ("x_scale?", "tensor(float)", "[] for all, [T, 1], or [T, ceil(K / x_group)]"),
        ("bias?", "T", "[2*I]"),
    ],
    outputs=[
        ("y", "X", "[T, I]; with y_dtype the values in 8 bits"),
        ("y_scale?", "tensor(float)", "with y_dtype: [T, ceil(I / y_group)], or [T, 1]"),
    ],
    attributes=[
        ("dtype", "int", "ONNX data type of the product"),
        ("activation", "string", "silu, gelu (erf), gelu_tanh or relu"),
        ("group", 0, "columns of the weight that share a scale; 0: a whole row"),
        ("x_group", 0, "columns of x that share a scale; 0: all of a token"),
        ("y_dtype", 0, "ONNX data type of the values, INT8 or FLOAT8E4M3FN; 0: not quantised"),
        ("y_group", 0, "columns of y that share a scale; 0: all of a token"),
    ],
    infer=_infer,
)
