"""Declaration of `ingot::Rope`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, set_output, shape_of


def _infer(context: InferenceContext) -> None:
    set_output(context, 0, elem_type(context, 0), shape_of(context, 0))


ROTATION: list[tuple[str, str | int | float, str]] = [
    ("interleaved", 0, "0: pairs (i, i + r/2); 1: pairs (2i, 2i + 1)"),
    ("rotary_offset", 0, "first rotated column in a head; columns outside [offset, offset + r) pass through"),
]

SCHEMA = declare(
    "Rope",
    "Rotary position embedding (Su et al., arXiv:2104.09864) of the first num_heads heads of each row; all other "
    "columns pass through, so x may be q, k, or packed q|k|v. The arithmetic is in the type of cos_sin, each product "
    "and the sum rounded to it; the result is rounded to the type of x.",
    inputs=[("x", "T", "[T, W]"), ("cos_sin", "C", "[T, r] from RotaryCosSin")],
    outputs=[("y", "T", "[T, W]")],
    attributes=[
        ("num_heads", "int", "heads that are rotated, from column 0 on"),
        ("head_dim", "int", "columns of a head"),
        *ROTATION,
    ],
    infer=_infer,
)
