"""Declaration of `ingot::Experts`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    set_output(context, 0, elem_type(context, 0), shape_of(context, 0))


SCHEMA = declare(
    "Experts",
    "sum over the k chosen experts e of expert_weight * down_e(act(gate_e(x)) * up_e(x)). The k products are summed in "
    "fp32 and rounded once; an index of E or more is skipped. swiglu_oai is gpt-oss's: (up + 1) * gate * "
    "sigmoid(alpha * gate), gate clamped to at most limit, up to [-limit, limit].",
    inputs=[
        ("x", "T", "[T, K]"),
        ("expert_index", "I", "[T, k]"),
        ("expert_weight", "C", "[T, k]"),
        ("gate_up", "T", "[E, 2*I, K], or [E, K, 2*I] if transposed"),
        ("down", "T", "[E, K, I], or [E, I, K] if transposed"),
        ("gate_up_bias?", "T", "[E, 2*I]"),
        ("down_bias?", "T", "[E, K]"),
    ],
    outputs=[("y", "T", "[T, K]")],
    attributes=[
        ("activation", "string", "silu, gelu, gelu_tanh, relu or swiglu_oai"),
        ("transposed", 0, "1: the weights are [in, out] per expert"),
        ("interleaved", 0, "0: gate is the first half of the 2*I columns; 1: gate is the even ones"),
        ("alpha", 1.702, "swiglu_oai only"),
        ("limit", 7.0, "swiglu_oai only"),
    ],
    infer=_infer,
)
