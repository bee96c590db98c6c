"""What TensorRT has a form of its own for, in that form: ingot's ops become standard ones that it imports and fuses.

Made on a copy; the engine's `model.onnx` stays as it was. Each lowering keeps the roundings of the op's definition
(`plugins/*/reference.py`): TensorRT networks are strongly typed, so what is computed in which type is said by casts.
What has no form here, or is asked to stay (`--tensorrt-plugins`), is left for the plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import onnx_ir as ir
import torch

from ...passes import drop_dead
from ...passes.graph import attribute, constant, dims, integers, new, nodes, operand, replace, reshape, size
from ...passes.verify import verify

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
    gate, up = (_columns(node, x, at, at + width) for at in (0, width))
    match attribute(node, "activation"):
        case "silu":
            wide = _cast(node, gate, FLOAT)  # rounded once
            act = _cast(node, _like(node, "Mul", wide, _like(node, "Sigmoid", wide)), x.dtype)
        case "relu":
            act = _like(node, "Relu", gate)
        case "gelu":
            act = _like(node, "Gelu", gate)
        case "gelu_tanh":
            act = new(node, "Gelu", [gate], dims(gate), gate.dtype, approximate="tanh")
        case _:
            return False
    replace(y, _like(node, "Mul", act, up))
    return True


def rms_norm(node: ir.Node) -> bool:
    """RMSNorm -> RMSNormalization of each chunk. Its own order of roundings is Llama's (normalise in fp32, round,
    multiply); where the weight is multiplied in fp32, everything is cast around it."""
    x, weight = operand(node), operand(node, 1)
    y = node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        x = _like(node, "Add", x, operand(node, 2))
        if len(node.outputs) > 1:
            replace(node.outputs[1], x)
    offset = attribute(node, "weight_offset", 0.0)
    dtype, in_fp32 = x.dtype, bool(offset or attribute(node, "fp32_multiply", 0)) and x.dtype != FLOAT
    if in_fp32:
        x, weight = _cast(node, x, FLOAT), _cast(node, weight, FLOAT)
    if offset:
        weight = _like(node, "Add", weight, constant(node, torch.tensor(offset, dtype=torch.float32)))
    chunk, shape = size(weight, 0), dims(x)
    rows = x if shape[-1] == chunk else reshape(node, x, (*shape[:-1], size(x, 1) // chunk, chunk))
    norm = new(node, "RMSNormalization", [rows, weight], dims(rows), rows.dtype, axis=-1, stash_type=int(FLOAT),
               epsilon=attribute(node, "epsilon"))  # fmt: skip
    norm = norm if rows is x else reshape(node, norm, shape)
    replace(y, _cast(node, norm, dtype) if in_fp32 else norm)
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
    part = x if turned == size(x, 1) else _columns(node, x, 0, turned)
    part = _cast(node, part, table.dtype)
    halves = [reshape(node, _columns(node, table, at, at + rotary // 2), (1, tokens, rotary // 2))
              for at in (0, rotary // 2)]  # fmt: skip
    part = reshape(node, part, (1, tokens, turned))
    part = new(node, "RotaryEmbedding", [part, *halves], dims(part), part.dtype, num_heads=heads,
               rotary_embedding_dim=rotary, interleaved=attribute(node, "interleaved", 0))  # fmt: skip
    part = _cast(node, reshape(node, part, (tokens, turned)), x.dtype)
    if turned != size(x, 1):
        rest = _columns(node, x, turned, size(x, 1))
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
}


def round_int4_scales(model: ir.Model) -> None:
    """Scales of INT4 weights in the type of what is dequantised: TensorRT has no INT4 with another one. Rounding a
    scale to bf16 changes a weight by 0.2% at most, which is little beside a step of INT4. Other formats stay."""
    for node in nodes(model, "DequantizeLinear"):
        y, scale = node.outputs[0], operand(node, 1)
        tensor = scale.const_value
        if operand(node).dtype != ir.DataType.INT4 or tensor is None or y.dtype is None or tensor.dtype == y.dtype:
            continue
        rounded = ir.LazyTensor(
            partial(_converted, tensor, y.dtype), y.dtype, ir.Shape(dims(scale)), name=f"{scale.name}.rounded"
        )
        value = ir.Value(name=rounded.name, type=ir.TensorType(y.dtype), shape=scale.shape, const_value=rounded)
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)


def _converted(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)


def lower(model: ir.Model, plugins: Collection[str]) -> None:
    """Lowers every op of `LOWERINGS` that is not among `plugins`. BuildError: it spoiled the graph."""
    for op, lowering in LOWERINGS.items():
        if op in plugins:
            continue
        for node in nodes(model, op):
            lowering(node)
        drop_dead(model)
    round_int4_scales(model)
    verify(model, "lowering to TensorRT's own ops")


def _like(before: ir.Node, op: str, *inputs: ir.Value) -> ir.Value:
    return new(before, op, inputs, dims(inputs[0]), inputs[0].dtype)


def _cast(before: ir.Node, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    return x if dtype is None or x.dtype == dtype else new(before, "Cast", [x], dims(x), dtype, to=int(dtype))


def _columns(before: ir.Node, x: ir.Value, begin: int, end: int) -> ir.Value:
    """x[:, begin:end]"""
    inputs = [x, *(integers(before, [number]) for number in (begin, end, 1))]
    return new(before, "Slice", inputs, (dims(x)[0], end - begin), x.dtype)
