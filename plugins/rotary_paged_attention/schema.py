"""Declaration of `ingot::RotaryPagedAttention`."""

from ..opschema import declare
from ..paged_attention.schema import ATTRIBUTES, STEP, infer
from ..rope.schema import ROTATION

SCHEMA = declare(
    "RotaryPagedAttention",
    "PagedAttention(Rope(x, cos_sin)) of a packed q|k|v, whose query and key heads are rotated.",
    inputs=[("x", "T", "[T, packed q|k|v]"), ("cos_sin", "C", "[T, r] from RotaryCosSin"), *STEP],
    outputs=[("y", "T", "[T, num_heads*v_head_dim]")],
    attributes=[*ATTRIBUTES, *ROTATION],
    infer=infer,
)
