"""Declaration of `ingot::GatedActivation`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    x = shape_of(context, 0)
    set_output(context, 0, elem_type(context, 0), x and [*x[:-1], x[-1] // 2 if isinstance(x[-1], int) else None])


SCHEMA = declare(
    "GatedActivation",
    "act(x[:, :I]) * x[:, I:] (Shazeer, arXiv:2002.05202); the activation is rounded before the product.",
    inputs=[("x", "T", "[T, 2*I], gate then up")],
    outputs=[("y", "T", "[T, I]")],
    attributes=[("activation", "string", "silu, gelu (erf), gelu_tanh or relu")],
    infer=_infer,
)
