"""How an op of domain `ingot` is declared: `declare(...)` gives an `onnx.defs.OpSchema`.

The schema is the op's contract: names and order of inputs, attributes and their defaults, shapes of the outputs.
ONNX's checker and shape inference know it once `plugins.register_schemas()` was called; the interpreter reads it
directly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnx import AttributeProto, TensorProto, TypeProto, helper
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext

from ..engines.errors import EngineError

DOMAIN = "ingot"
VERSION = 1

QUANTISED = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)  # what KV pages with scales hold

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_EIGHT_BITS = ["tensor(int8)", "tensor(float8e4m3fn)"]
_INTS = ["tensor(int32)", "tensor(int64)"]
_TYPES = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT, "string": OpSchema.AttrType.STRING}

Field = tuple[str, str, str]  # name (a trailing ? makes it optional), type ("T" or an ONNX type), meaning
Dim = int | str | None
Inference = Callable[[InferenceContext], None]


def declare(
    name: str,
    doc: str,
    *,
    inputs: Sequence[Field],
    outputs: Sequence[Field],
    attributes: Sequence[tuple[str, str | int | float, str]] = (),
    infer: Inference | None = None,
) -> OpSchema:
    """The schema of `ingot::name`. An attribute is (name, default, meaning); "int", "float" or "string" in place of a
    default makes it required."""
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[_parameter(*field) for field in inputs],
        outputs=[_parameter(*field) for field in outputs],
        attributes=[_attribute(*attribute) for attribute in attributes],
        type_constraints=[
            ("T", _FLOATS, "the activation type"),
            ("C", _FLOATS, "the type of rotary tables and of router weights, often fp32"),
            ("I", _INTS, "an index type"),
            ("Q", _EIGHT_BITS, "the type of quantised activations and pages"),
            ("W", [*_EIGHT_BITS, "tensor(int4)"], "the type of quantised weights"),
            ("X", [*_FLOATS, *_EIGHT_BITS], "activations or KV pages, quantised or not"),
        ],
    )
    if infer:
        schema.set_type_and_shape_inference_function(infer)
    return schema


def _parameter(name: str, type_: str, doc: str) -> OpSchema.FormalParameter:
    kind = OpSchema.FormalParameterOption
    option = kind.Optional if name.endswith("?") else kind.Single
    return OpSchema.FormalParameter(name.rstrip("?"), type_, doc, param_option=option)


def _attribute(name: str, default: str | int | float, doc: str) -> OpSchema.Attribute:
    if isinstance(default, str) and default in _TYPES:
        return OpSchema.Attribute(name, _TYPES[default], doc, required=True)
    return OpSchema.Attribute(name, helper.make_attribute(name, default), doc)


def shape_of(context: InferenceContext, index: int) -> list[Dim] | None:
    """Dimensions of an input (numbers, names, None for unknown), or None where the rank is unknown."""
    type_ = context.get_input_type(index) if index < context.get_num_inputs() else None
    if type_ is None or not type_.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param if dim.HasField("dim_param") else None
        for dim in type_.tensor_type.shape.dim
    ]


def set_output(context: InferenceContext, index: int, elem_type: int, shape: Sequence[Dim] | None) -> None:
    """Declares an output; without a shape only its type is known."""
    tensor: TypeProto = helper.make_tensor_type_proto(elem_type, shape)
    context.set_output_type(index, tensor)


def elem_type(context: InferenceContext, index: int) -> int:
    """ONNX data type number of an input."""
    return context.get_input_type(index).tensor_type.elem_type


def int_attribute(context: InferenceContext, name: str, default: int = 0) -> int:
    """Value of an int attribute of the node."""
    attribute: AttributeProto | None = context.get_attribute(name)
    return default if attribute is None else attribute.i


def infer_quantised(
    context: InferenceContext, shape: Sequence[Dim] | None, dtype: str = "dtype", group: str = "group"
) -> None:
    """Declares outputs 0 and 1 as [T, K] in the 8 bits of attribute `dtype`, and the scales of tokens or of groups."""
    columns = int_attribute(context, group)
    set_output(context, 0, int_attribute(context, dtype), shape)
    if shape is not None:
        groups = 1 if not columns else -(-shape[1] // columns) if isinstance(shape[1], int) else None
        set_output(context, 1, TensorProto.FLOAT, [shape[0], groups])


def complete_attributes(node: ir.Node, schema: OpSchema, given: dict[str, Any]) -> dict[str, Any]:
    """The attributes of an ingot node with the schema's defaults filled in. EngineError: an unknown or missing one."""
    for name in given.keys() - schema.attributes.keys():
        raise EngineError(f"{where(node)} has the attribute '{name}'; known are {', '.join(schema.attributes)}")
    if len(node.inputs) > schema.max_input:
        raise EngineError(f"{where(node)} has {len(node.inputs)} inputs; at most {schema.max_input} were expected")
    _check_pages(node, schema)
    complete = {}
    for name, attribute in schema.attributes.items():
        if name in given:
            complete[name] = given[name]
        elif attribute.required:
            raise EngineError(f"{where(node)} lacks the attribute '{name}', which its schema requires")
        elif attribute.default_value.type:
            value = helper.get_attribute_value(attribute.default_value)
            complete[name] = value.decode() if isinstance(value, bytes) else value
    return complete


def _check_pages(node: ir.Node, schema: OpSchema) -> None:
    """Numbers of 8 bits in KV pages mean nothing without scales: there is no default."""
    inputs = {
        parameter.name: value for parameter, value in zip(schema.inputs, node.inputs, strict=False) if value is not None
    }
    for pages, scale in (("k_pages", "k_scale"), ("v_pages", "v_scale")):
        kind = inputs[pages].dtype if pages in inputs else None
        if kind is None or (kind in QUANTISED) == (scale in inputs):
            continue
        if scale in inputs:
            raise EngineError(f"{where(node)} has a {scale}, but its {pages} are {kind.name}; pages of 8 bits have one")
        raise EngineError(
            f"{where(node)} has {pages} of {kind.name} without a {scale}; a KV cache in 8 bits needs calibrated "
            "scales: build with `--kv-cache` and `--calibration-data`"
        )


def where(node: ir.Node) -> str:
    """How messages call a node."""
    return f"node '{node.name or '?'}' ({node.domain or 'ai.onnx'}::{node.op_type})"
