"""The schemas: registered once and by request, known to the checker, right about the shapes of the references."""

import subprocess
import sys

import onnx
import pytest
import torch
from ingot.plugins import OPS, register_schemas
from onnx import TensorProto, helper, shape_inference


def test_nothing_registers_on_import():
    code = "import ingot.plugins, onnx; assert not onnx.defs.has('Linear', 'ingot')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registers_twice_without_error():
    register_schemas()
    register_schemas()
    assert all(onnx.defs.has(name, "ingot") for name in OPS)
    assert all(op.schema.name == name and op.schema.doc for name, op in OPS.items())


PAGED = ["q", "", "", "slots", "query_start", "kv_len", "pages", "k_pages", "v_pages"]
ATTENTION = {"layer": 0, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "v_head_dim": 6, "scale": 1.0}
CASES = {
    "Linear": (["x", "w"], {}, 1),
    "RMSNorm": (["x", "d", "x"], {"epsilon": 1e-5}, 2),
    "RotaryCosSin": (["positions", "inv_freq"], {"dtype": TensorProto.FLOAT16}, 1),
    "Rope": (["x", "cos_sin"], {"num_heads": 2, "head_dim": 8}, 1),
    "GatedLinear": (["x", "w"], {"activation": "silu"}, 1),
    "GatedActivation": (["x"], {"activation": "silu"}, 1),
    "Experts": (["x", "index", "route", "gate_up", "down"], {"activation": "relu"}, 1),
    "QuantiseTokens": (["x"], {"dtype": TensorProto.INT8, "group": 8}, 2),
    "QuantisedLinear": (["x8", "w8", "w_scale", "", "x_scale"], {"dtype": TensorProto.BFLOAT16, "group": 8}, 1),
    "QuantisedRMSNorm": (["x", "d24", "x"], {"epsilon": 1e-5, "dtype": TensorProto.INT8, "group": 8}, 3),
    "QuantisedGatedActivation": (["x"], {"activation": "relu", "dtype": TensorProto.INT8}, 2),
    "GatedQuantisedLinear": (
        ["x8", "w8", "w_scale", "", "x_scale"],
        {"dtype": TensorProto.FLOAT16, "group": 8, "activation": "relu", "y_dtype": TensorProto.INT8, "y_group": 4},
        2,
    ),
    "RotaryPagedAttention": (["q", "cos_sin", *PAGED[3:]], ATTENTION, 1),
    "PagedAttention": (PAGED, ATTENTION, 1),
}


def tensors(tokens):
    return {
        "x": torch.randn(tokens, 24),
        "w": torch.randn(10, 24),
        "d": torch.randn(12),
        "d24": torch.randn(24),
        "x8": torch.ones(tokens, 24, dtype=torch.int8),
        "w8": torch.ones(10, 24, dtype=torch.int8),
        "w_scale": torch.rand(10, 3),
        "x_scale": torch.rand(tokens, 1),
        "positions": torch.arange(tokens, dtype=torch.int32),
        "inv_freq": torch.rand(4),
        "cos_sin": torch.randn(tokens, 8),
        "index": torch.zeros(tokens, 2, dtype=torch.int32),
        "route": torch.rand(tokens, 2),
        "gate_up": torch.randn(3, 14, 24),
        "down": torch.randn(3, 24, 7),
        "q": torch.randn(tokens, 30),
        "slots": torch.arange(tokens, dtype=torch.int32),
        "query_start": torch.tensor([0, tokens], dtype=torch.int32),
        "kv_len": torch.tensor([tokens], dtype=torch.int32),
        "pages": torch.arange(3, dtype=torch.int32)[None],
        "k_pages": torch.zeros(3, 4, 1, 8),
        "v_pages": torch.zeros(3, 4, 1, 6),
    }


@pytest.mark.parametrize("op", OPS)
def test_inferred_shapes_are_the_references(op):
    register_schemas()
    inputs, attributes, num_outputs = CASES[op]
    tokens = 5
    given = tensors(tokens)
    node = helper.make_node(op, inputs, [f"y{i}" for i in range(num_outputs)], domain="ingot", **attributes)
    types = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32, torch.int8: TensorProto.INT8}
    infos = [
        helper.make_tensor_value_info(
            name, types[given[name].dtype], ["T" if size == tokens else size for size in given[name].shape]
        )
        for name in dict.fromkeys(inputs)
        if name
    ]
    outputs = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(num_outputs)]
    model = helper.make_model(
        helper.make_graph([node], "one", infos, outputs),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("ingot", 1)],
        ir_version=10,
    )
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(inferred, full_check=True, check_custom_domain=True)
    results = OPS[op].reference(*(given.get(name) for name in inputs), **attributes)
    results = results if isinstance(results, tuple) else (results,)
    dtypes = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16,
              TensorProto.BFLOAT16: torch.bfloat16, TensorProto.INT8: torch.int8}  # fmt: skip
    for info, result in zip(inferred.graph.output, results, strict=True):
        type_ = info.type.tensor_type
        assert dtypes[type_.elem_type] == result.dtype
        assert [dim.dim_value or dim.dim_param for dim in type_.shape.dim] == ["T", *result.shape[1:]]


def test_checker_refuses_a_missing_attribute():
    register_schemas()
    node = helper.make_node("Rope", ["x", "c"], ["y"], domain="ingot", num_heads=1)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "c", "y")]
    model = helper.make_model(
        helper.make_graph([node], "one", infos[:2], infos[2:]), opset_imports=[helper.make_opsetid("ingot", 1)]
    )
    with pytest.raises(onnx.checker.ValidationError, match="head_dim"):
        onnx.checker.check_model(model, check_custom_domain=True)
