"""What TensorRT has a form of its own for, in that form: ingot's ops become standard ones that it imports and fuses.

Made on a copy; the engine's `model.onnx` stays as it was. Each lowering keeps the roundings of the op's definition
(`plugins/*/reference.py`): TensorRT networks are strongly typed, so what is computed in which type is said by casts.
What has no form here, or is asked to stay (`--tensorrt-plugins`), is left for the plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx_ir as ir
import torch

from ...passes import drop_dead
from ...passes.graph import attribute, constant, dims, new, nodes, operand, replace, reshape, size
from ...passes.verify import verify
from .quantised import quantise_tokens, round_int4_scales, tables, token_products, token_scales, zero_points
from .spelling import cast, columns, like

FLOAT = ir.DataType.FLOAT
Lowering = Callable[[ir.Node], bool]  # False: this node has no standard form


def linear(node: ir.Node) -> bool:
    """Linear -> Gemm with transB, so that the weight stays in the checkpoint's layout, [N, K]."""
    y = node.outputs[0]
    replace(y, new(node, "Gemm", list(node.inputs), dims(y), y.dtype, transB=1))
    return True


def gated_activation(node: ir.Node) -> bool:
    """GatedActivation -> act(first half) * second half."""
    x, y = operand(node), node.outputs[0]
    width = size(x, 1) // 2
    gate, up = (columns(node, x, at, at + width) for at in (0, width))
    match attribute(node, "activation"):
        case "silu":
            wide = cast(node, gate, FLOAT)  # rounded once
            act = cast(node, like(node, "Mul", wide, like(node, "Sigmoid", wide)), x.dtype)
        case "relu":
            act = like(node, "Relu", gate)
        case "gelu":
            act = like(node, "Gelu", gate)
        case "gelu_tanh":
            act = new(node, "Gelu", [gate], dims(gate), gate.dtype, approximate="tanh")
        case _:
            return False
    replace(y, like(node, "Mul", act, up))
    return True


def rms_norm(node: ir.Node) -> bool:
    """RMSNorm -> RMSNormalization of each chunk. Its own order of roundings is Llama's (normalise in fp32, round,
    multiply); where the weight is multiplied in fp32, everything is cast around it."""
    x, weight = operand(node), operand(node, 1)
    y = node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        x = like(node, "Add", x, operand(node, 2))
        if len(node.outputs) > 1:
            replace(node.outputs[1], x)
    offset = attribute(node, "weight_offset", 0.0)
    dtype, in_fp32 = x.dtype, bool(offset or attribute(node, "fp32_multiply", 0)) and x.dtype != FLOAT
    if in_fp32:
        x, weight = cast(node, x, FLOAT), cast(node, weight, FLOAT)
    if offset:
        weight = like(node, "Add", weight, constant(node, torch.tensor(offset, dtype=torch.float32)))
    chunk, shape = size(weight, 0), dims(x)
    rows = x if shape[-1] == chunk else reshape(node, x, (*shape[:-1], size(x, 1) // chunk, chunk))
    norm = new(node, "RMSNormalization", [rows, weight], dims(rows), rows.dtype, axis=-1, stash_type=int(FLOAT),
               epsilon=attribute(node, "epsilon"))  # fmt: skip
    norm = norm if rows is x else reshape(node, norm, shape)
    replace(y, cast(node, norm, dtype) if in_fp32 else norm)
    return True


def rope(node: ir.Node) -> bool:
    """Rope -> RotaryEmbedding of the rotated columns, the others beside it; heads that turn from a later column on
    have no standard form."""
    if attribute(node, "rotary_offset", 0):
        return False
    x, table, y = operand(node), operand(node, 1), node.outputs[0]
    heads, rotary = attribute(node, "num_heads"), size(table, 1)
    turned = heads * attribute(node, "head_dim")
    tokens = dims(x)[0]
    part = x if turned == size(x, 1) else columns(node, x, 0, turned)
    part = cast(node, part, table.dtype)
    halves = [reshape(node, columns(node, table, at, at + rotary // 2), (1, tokens, rotary // 2))
              for at in (0, rotary // 2)]  # fmt: skip
    part = reshape(node, part, (1, tokens, turned))
    part = new(node, "RotaryEmbedding", [part, *halves], dims(part), part.dtype, num_heads=heads,
               rotary_embedding_dim=rotary, interleaved=attribute(node, "interleaved", 0))  # fmt: skip
    part = cast(node, reshape(node, part, (tokens, turned)), x.dtype)
    if turned != size(x, 1):
        rest = columns(node, x, turned, size(x, 1))
        part = new(node, "Concat", [part, rest], dims(x), x.dtype, axis=1)
    replace(y, part)
    return True


# what `--tensorrt-plugins` may name; Rope is one by default, since the attention plugin turns what it reads anyway.
# RotaryCosSin has no entry: its angles reach 1e5 radians, and how exact TensorRT's cosine is there is not known
LOWERINGS: dict[str, Lowering] = {
    "Linear": linear,
    "GatedActivation": gated_activation,
    "RMSNorm": rms_norm,
    "Rope": rope,
    "QuantiseTokens": quantise_tokens,
}


def lower(model: ir.Model, plugins: Collection[str]) -> None:
    """Lowers every op of `LOWERINGS` that is not among `plugins`. BuildError: it spoiled the graph."""
    if "Linear" not in plugins:
        token_products(model)
        zero_points(model)
    tables(model)
    token_scales(model)
    for op, lowering in LOWERINGS.items():
        if op in plugins:
            continue
        for node in nodes(model, op):
            lowering(node)
        drop_dead(model)
    round_int4_scales(model)
    verify(model, "lowering to TensorRT's own ops")
