"""Short ways to write standard ONNX nodes in front of another one; all return the new node's output."""

from __future__ import annotations

import onnx_ir as ir

from ...passes.graph import dims, integers, new


def like(before: ir.Node, op: str, *inputs: ir.Value) -> ir.Value:
    """An op whose output has the shape and type of its first input."""
    return new(before, op, inputs, dims(inputs[0]), inputs[0].dtype)


def cast(before: ir.Node, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """x itself where it has the type."""
    return x if dtype is None or x.dtype == dtype else new(before, "Cast", [x], dims(x), dtype, to=int(dtype))


def columns(before: ir.Node, x: ir.Value, begin: int, end: int) -> ir.Value:
    """x[:, begin:end]"""
    inputs = [x, *(integers(before, [number]) for number in (begin, end, 1))]
    return new(before, "Slice", inputs, (dims(x)[0], end - begin), x.dtype)
