"""Declaration of `ingot::RotaryCosSin`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, int_attribute, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    positions, inv_freq = shape_of(context, 0), shape_of(context, 1)
    half = inv_freq and inv_freq[0]
    shape = positions and [positions[0], 2 * half if isinstance(half, int) else None]
    set_output(context, 0, int_attribute(context, "dtype", 1), shape)


SCHEMA = declare(
    "RotaryCosSin",
    "Cosines (first half of the columns) and sines (second half) of positions * inv_freq, times attention_scaling, "
    "in fp32, then rounded. RoPE scaling (llama3, YaRN, LongRoPE) is in inv_freq and attention_scaling.",
    inputs=[("positions", "I", "[T]"), ("inv_freq", "tensor(float)", "[r/2] radians per position")],
    outputs=[("cos_sin", "C", "[T, r]")],
    attributes=[
        ("attention_scaling", 1.0, "factor on cosines and sines (YaRN, LongRoPE)"),
        ("dtype", "int", "ONNX data type of the result"),
    ],
    infer=_infer,
)
