"""The standard ops against onnx's own evaluator: one node a case, its secondary inputs constant, then varying."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from ingot.plugins.interpreter import Program
from ingot.plugins.onnx_ops import ONNX_OPS
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

RNG = np.random.default_rng()


def f(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return np.abs(f(*shape)) + 0.1


def i32(*values):
    return np.array(values, np.int32)


def i64(*values):
    return np.array(values, np.int64)


def b(*shape):
    return RNG.random(shape) > 0.5


CASES = [
    *[(op, [f(3, 5)], {}) for op in ("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Neg", "Relu", "Round")],
    *[(op, [f(3, 5)], {}) for op in ("Sigmoid", "Sign", "Sin", "Softplus", "Tanh", "Shape", "Size", "Reciprocal")],
    *[(op, [positive(4, 1)], {}) for op in ("Log", "Sqrt")],
    *[(op, [f(3, 1, 5), f(4, 1)], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")],
    *[(op, [i32(1, 5, 3), i32(2, 5, 1)], {}) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")],
    *[(op, [b(3, 4), b(4)], {}) for op in ("And", "Or", "Xor")],
    ("Not", [b(3, 4)], {}),
    ("Max", [f(3), f(3), f(3)], {}),
    ("IsNaN", [np.array([1.0, np.nan, np.inf], np.float32)], {}),
    ("IsInf", [np.array([1.0, np.nan, np.inf, -np.inf], np.float32)], {}),
    ("Div", [i64(7, -7, 6), i64(2, 2, -4)], {}),
    ("Mod", [i64(7, -7, 6), i64(2, 2, -4)], {}),
    ("Mod", [f(6), positive(6)], {"fmod": 1}),
    ("Pow", [positive(3, 4), np.float32(2.5)], {}),
    ("Pow", [f(3, 4), i64(2)], {}),
    ("Gelu", [f(9)], {}),
    ("Gelu", [f(9)], {"approximate": "tanh"}),
    ("Swish", [f(9)], {"alpha": 1.5}),
    ("Clip", [f(9), np.float32(-0.3), np.float32(0.4)], {}),
    ("Clip", [f(9), None, np.float32(0.4)], {}),
    ("Where", [b(3, 1), f(3, 4), f(4)], {}),
    ("MatMul", [f(2, 3, 5), f(5, 4)], {}),
    ("Gemm", [f(5, 3), f(4, 5), f(4)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [f(3, 5), f(5, 4)], {}),
    ("Softmax", [f(3, 4, 5)], {"axis": 1}),
    ("LogSoftmax", [f(3, 4)], {}),
    ("LayerNormalization", [f(3, 8), f(8), f(8)], {"epsilon": 1e-3}),
    ("LayerNormalization", [f(3, 2, 4), f(2, 4)], {"axis": 1}),
    ("RMSNormalization", [f(3, 8), f(8)], {"epsilon": 1e-3}),
    ("RMSNormalization", [f(2, 3, 4), f(3, 4)], {"axis": 1}),
    ("RotaryEmbedding", [f(2, 3, 5, 8), f(2, 5, 4), f(2, 5, 4)], {}),
    ("RotaryEmbedding", [f(2, 5, 24), f(50, 4), f(50, 4), i64(*range(9, -1, -1)).reshape(2, 5)], {"num_heads": 3}),
    ("RotaryEmbedding", [f(1, 3, 5, 8), f(1, 5, 2), f(1, 5, 2)], {"rotary_embedding_dim": 4, "interleaved": 1}),
    ("ReduceMean", [f(3, 4, 5), i64(1, -1)], {"keepdims": 0}),
    ("ReduceMean", [f(3, 4)], {}),
    ("ReduceSum", [f(3, 4, 5), i64(0)], {}),
    ("ReduceSum", [i32(3, 4, 5)], {"keepdims": 0}),
    ("ReduceSum", [f(3, 4)], {"noop_with_empty_axes": 1}),
    ("ReduceMax", [f(3, 4, 5), i64(2)], {}),
    ("ReduceMin", [f(3, 4, 5), i64(0, 2)], {}),
    ("ReduceProd", [f(3, 4, 5), i64(0, 2)], {"keepdims": 0}),
    ("ArgMax", [f(3, 7)], {"axis": 1, "keepdims": 0}),
    ("ArgMin", [f(3, 7)], {}),
    ("TopK", [f(3, 9), i64(4)], {}),
    ("TopK", [f(9, 3), i64(2)], {"axis": 0, "largest": 0}),
    ("Cast", [f(5) * 9], {"to": TensorProto.INT32}),
    ("Cast", [i64(0, 1, 5)], {"to": TensorProto.BOOL}),
    ("CastLike", [f(5) * 9, i64(0)], {}),
    ("Reshape", [f(3, 4, 5), i64(0, -1)], {}),
    ("Reshape", [f(3, 4, 5), i64(5, 2, 0 + 6)], {}),
    ("Reshape", [f(0, 4), i64(2, 0)], {"allowzero": 1}),
    ("Reshape", [f(0, 4, 6), i64(-1, 24)], {}),
    ("Transpose", [f(2, 3, 4)], {}),
    ("Transpose", [f(2, 3, 4)], {"perm": [1, 2, 0]}),
    ("Flatten", [f(2, 3, 4)], {"axis": 2}),
    ("Flatten", [f(2, 3, 4)], {"axis": -2}),
    ("Squeeze", [f(1, 3, 1), i64(-1)], {}),
    ("Squeeze", [f(1, 3, 1)], {}),
    ("Unsqueeze", [f(3, 4), i64(-1, 0)], {}),
    ("Expand", [f(3, 1), i64(2, 1, 4)], {}),
    ("Concat", [f(2, 3), f(2, 1), f(2, 4)], {"axis": -1}),
    ("Split", [f(2, 9), i64(2, 3, 4)], {"axis": 1}),
    ("Split", [f(8, 2)], {"num_outputs": 3}),
    ("Slice", [f(6, 7), i64(1), i64(5)], {}),
    ("Slice", [f(6, 7), i64(1, -3), i64(2**62, -1), i64(1, 0)], {}),
    ("Slice", [f(6, 7), i64(0, 1), i64(6, 7), i64(0, -1), i64(2, 3)], {}),
    ("Slice", [f(6, 7), i64(-1), i64(-(2**62)), i64(1), i64(-2)], {}),
    ("Slice", [f(6, 7), i64(4, 100), i64(1, 200), i64(0, 1)], {}),
    ("Slice", [f(6, 7), i64(5, -3), i64(0, 2), i64(0, 1), i64(-2, -1)], {}),
    ("Gather", [f(6, 3), i32(5, 0, -1)], {}),
    ("Gather", [f(2, 6, 3), i64(5, 0, -6, 2).reshape(2, 2)], {"axis": 1}),
    ("Gather", [f(2, 6), np.int64(3)], {"axis": -1}),
    ("GatherElements", [f(3, 4), i64(*range(-2, 4)).reshape(3, 2)], {"axis": 1}),
    ("GatherND", [f(3, 4, 2), i64(0, 1, 2, 3).reshape(2, 2)], {}),
    ("ScatterElements", [f(3, 5), i64(1, -1, 0).reshape(1, 3), f(1, 3)], {"axis": 1}),
    ("ScatterElements", [f(3, 5), i64(1, 1, 0).reshape(1, 3), f(1, 3)], {"axis": 1, "reduction": "add"}),
    ("ScatterND", [f(4, 3), i64(1, 3).reshape(2, 1), f(2, 3)], {}),
    ("Range", [i64(3).reshape(()), i64(11).reshape(()), i64(2).reshape(())], {}),
    ("Range", [np.float32(1), np.float32(-1), np.float32(-0.25)], {}),
    ("ConstantOfShape", [i64(2, 3)], {"value": helper.make_tensor("v", TensorProto.INT64, [1], [7])}),
    ("ConstantOfShape", [i64(2, 0)], {}),
    ("Shape", [f(2, 3, 4)], {"start": -2, "end": 3}),
    ("OneHot", [i64(0, 2, -1, 9), np.int64(4), f(2)], {}),
    ("OneHot", [i64(0, 2, 1, 3).reshape(2, 2), np.int64(4), f(2)], {"axis": 0}),
    ("OneHot", [i64(0, 2, 1, 3).reshape(2, 2), np.int64(4), f(2)], {"axis": 1}),
    ("Tile", [f(2, 3), i64(2, 1)], {}),
    ("Trilu", [f(4, 5)], {"upper": 0}),
    ("Trilu", [f(4, 5), np.int64(1)], {}),
    ("DequantizeLinear", [np.arange(-6, 6, dtype=np.int8).reshape(3, 4), np.float32(0.5)], {}),
    ("DequantizeLinear", [np.arange(-6, 6, dtype=np.int8).reshape(3, 4), f(3)], {"axis": 0}),
    ("QuantizeLinear", [f(3, 4) * 50, np.float32(0.5)], {"output_dtype": 3}),
    ("QuantizeLinear", [f(3, 4), positive(4) / 9, np.arange(4, dtype=np.int8)], {"axis": 1, "output_dtype": 3}),
    ("DequantizeLinear", [np.arange(12, dtype=np.int8).reshape(3, 4), f(4), np.arange(4, dtype=np.int8)], {"axis": 1}),
    (
        "DequantizeLinear",
        [np.arange(-12, 12, dtype=np.int8).reshape(3, 8), f(3, 2), np.ones((3, 2), np.int8)],
        {"axis": 1, "block_size": 4},
    ),
    ("QuantizeLinear", [f(3, 4) * 300, np.float32(0.7)], {"output_dtype": TensorProto.INT8}),
    ("QuantizeLinear", [f(3, 4) * 9, np.float32(0.07)], {}),
    ("QuantizeLinear", [f(3, 4) * 99, np.abs(f(3)) + 1, np.arange(3, dtype=np.int8)], {"axis": 0}),
    ("QuantizeLinear", [f(3, 8), np.abs(f(3, 2)) + 0.1, np.ones((3, 2), np.int8)], {"axis": 1, "block_size": 4}),
    ("Constant", [], {"value_ints": [1, 2, 3]}),
    ("Constant", [], {"value_float": 1.5}),
    ("Constant", [], {"value": helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])}),
]

OPSET = {"Swish": 24}


def graph(op, arrays, attributes, constant):
    """A model of one node; of its inputs, the first or all vary."""
    names = ["" if array is None else f"in{i}" for i, array in enumerate(arrays)]
    outputs = {"TopK": 2, "Split": 3}.get(op, 1)
    given = [(name, array) for name, array in zip(names, arrays, strict=True) if name]
    varying, fixed = (given[:1], given[1:]) if constant else (given, [])
    node = helper.make_node(op, names, [f"out{i}" for i in range(outputs)], **attributes)
    types = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype), array.shape)
        for name, array in varying
    ]
    results = [helper.make_empty_tensor_value_info(f"out{i}") for i in range(outputs)]
    fixed = [numpy_helper.from_array(np.asarray(array), name) for name, array in fixed]
    opset = [helper.make_opsetid("", OPSET.get(op, 23))]
    model = helper.make_model(helper.make_graph([node], "one", types, results, fixed), opset_imports=opset)
    return model, dict(varying)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "varying"])
@pytest.mark.parametrize("op, arrays, attributes", CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)])
def test_equals_onnx_reference(op, arrays, attributes, constant):
    model, inputs = graph(op, arrays, attributes, constant)
    expected = ReferenceEvaluator(model).run(None, inputs)
    ours = Program(ir.from_proto(model), {})({name: torch.from_numpy(np.array(a)) for name, a in inputs.items()})
    assert len(expected) == len(ours)
    for theirs, y in zip(expected, ours.values(), strict=True):
        assert tuple(np.shape(theirs)) == tuple(y.shape)
        assert (
            helper.np_dtype_to_tensor_dtype(np.asarray(theirs).dtype)
            == ir.from_proto(numpy_helper.from_array(y.numpy())).dtype
        )
        np.testing.assert_allclose(y.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_every_op_of_the_table_is_tested():
    assert ONNX_OPS.keys() == {case[0] for case in CASES} | {"SplitToSequence", "SequenceAt"}


@pytest.mark.parametrize("split", [np.int64(3), i64(2, 4, 1)])
@pytest.mark.parametrize("position", [0, 1, -1])
def test_sequences(split, position):
    nodes = [
        helper.make_node("SplitToSequence", ["x", "split"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "position"], ["y"]),
    ]
    constants = {"split": np.asarray(split), "position": np.int64(position)}
    fixed = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    x = f(2, 7)
    info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    graph = helper.make_graph(nodes, "sequence", info, [helper.make_empty_tensor_value_info("y")], fixed)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    [expected] = ReferenceEvaluator(model).run(None, {"x": x})
    assert np.array_equal(Program(ir.from_proto(model), {})({"x": torch.from_numpy(x)})["y"].numpy(), expected)


def test_reduced_precision_stays():
    """RMSNormalization of bf16 rounds before the scale, as Llama does."""
    x, scale = torch.randn(4, 16).bfloat16(), torch.randn(16).bfloat16()
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=1e-6)
    info = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, s) for n, s in (("x", (4, 16)), ("w", (16,)))]
    out = [helper.make_empty_tensor_value_info("y")]
    model = helper.make_model(helper.make_graph([node], "g", info, out), opset_imports=[helper.make_opsetid("", 23)])
    y = Program(ir.from_proto(model), {})({"x": x, "w": scale})["y"]
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(y, h.bfloat16() * scale)
