"""Declaration of `ingot::RMSNorm`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    for output in range(context.get_num_outputs()):
        set_output(context, output, elem_type(context, 0), shape_of(context, 0))


SCHEMA = declare(
    "RMSNorm",
    "Root-mean-square norm (Zhang and Sennrich, arXiv:1910.07467) of each consecutive chunk of D columns, D being the "
    "weight's length, in fp32. With a residual, x + residual is rounded, normalised, and also returned.",
    inputs=[("x", "T", "[T, n*D]"), ("weight", "T", "[D]"), ("residual?", "T", "[T, n*D]")],
    outputs=[("y", "T", "[T, n*D]"), ("sum?", "T", "[T, n*D], only with a residual")],
    attributes=[
        ("epsilon", "float", "added to the mean square"),
        ("weight_offset", 0.0, "added to the weight in fp32 (Gemma: 1.0); implies fp32_multiply"),
        ("fp32_multiply", 0, "1: multiply by the weight in fp32 and round once; 0: round, then multiply"),
    ],
    infer=_infer,
)
