"""Declaration of `ingot::PagedAttention`."""

from onnx.shape_inference import InferenceContext

from ..opschema import declare, elem_type, int_attribute, set_output, shape_of


def infer(context: InferenceContext) -> None:
    query = shape_of(context, 0)
    width = int_attribute(context, "num_heads") * int_attribute(context, "v_head_dim")
    set_output(context, 0, elem_type(context, 0), query and [query[0], width])


STEP = [
    ("slots", "I", "[T] page * page_size + offset"),
    ("query_start", "I", "[S+1]"),
    ("kv_len", "I", "[S] keys of a sequence, this step's included"),
    ("pages", "I", "[S, P]"),
    ("k_pages", "X", "[num_pages, page_size, num_kv_heads, head_dim]: of type T, or int8 or fp8 with scales"),
    ("v_pages", "X", "[num_pages, page_size, num_kv_heads, v_head_dim]"),
    ("sinks?", "T", "[num_heads] a logit that takes part in the softmax and has no value (gpt-oss)"),
    ("k_scale?", "tensor(float)", "[1] or [num_kv_heads], of quantised pages: a key is its number times this"),
    ("v_scale?", "tensor(float)", "[1] or [num_kv_heads], of quantised pages"),
    ("ancestors?", "I", "[T] int32, where drafts are a tree: bit b: sees key kv_len - 32 + b of its sequence; -1: all"),
]
ATTRIBUTES: list[tuple[str, str | int | float, str]] = [
    ("layer", "int", "index of the KV pool"),
    ("num_heads", "int", "query heads"),
    ("num_kv_heads", "int", "key and value heads"),
    ("head_dim", "int", "columns of a query or key head"),
    ("v_head_dim", "int", "columns of a value head"),
    ("scale", "float", "factor on the scores"),
    ("window", 0, "a query sees keys with 0 <= pos_q - pos_k < window; 0: all"),
    ("softcap", 0.0, "scores become softcap * tanh(score / softcap); 0: off"),
]

SCHEMA = declare(
    "PagedAttention",
    "Writes this step's keys and values into the pool, then attends (Kwon et al., arXiv:2309.06180). Sequences lie "
    "flat; query token j of n of sequence s has position kv_len[s] - n + j and sees keys up to it. Without key and "
    "value the query is packed q|k|v. k_pages and v_pages are updated in place. Softmax and its scores are fp32. "
    "Pages of int8 or fp8 hold round(k / k_scale), ties to even, saturated; what is read is multiplied by the scale in "
    "fp32, and attention over it is fp32. Where ancestors are given, the last 32 keys of a sequence may be nodes of a "
    "tree: a query sees those among them whose bit is set, up to itself; positions of query and keys are their numbers "
    "less that of the keys before them which the query does not see.",
    inputs=[
        ("query", "T", "[T, num_heads*head_dim], or packed q|k|v"),
        ("key?", "T", "[T, num_kv_heads*head_dim]"),
        ("value?", "T", "[T, num_kv_heads*v_head_dim]"),
        *STEP,
    ],
    outputs=[("y", "T", "[T, num_heads*v_head_dim]")],
    attributes=ATTRIBUTES,
    infer=infer,
)
