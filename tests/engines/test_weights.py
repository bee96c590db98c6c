"""Weights and graph on disk: byte-exact, aligned, one tensor at a time, and the graph points into the file."""

import gc
import weakref

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from ingot.engines.dtypes import DTYPES, from_numpy, from_safetensors
from ingot.engines.inspect import operations
from ingot.engines.weights import GRAPH_FILE, Weight, load_graph, open_weights, save_graph, write_weights


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_row_agrees_with_itself(name):
    dtype = DTYPES[name]
    assert from_numpy(dtype.numpy) is dtype and from_safetensors(dtype.safetensors) is dtype
    assert dtype.numpy.itemsize == dtype.torch.itemsize == dtype.onnx.itemsize == dtype.itemsize
    assert dtype.onnx.numpy() == dtype.numpy


def test_round_trip_and_alignment(tmp_path):
    rng = np.random.default_rng()
    arrays = {
        "scalar": np.float32(3).reshape(()),
        "odd": rng.standard_normal((3, 5)).astype(np.float16),
        "empty": np.zeros((0, 4), np.int64),
        "w": rng.standard_normal((17, 64)).astype(np.float32),
        "b": rng.standard_normal((32, 32)).astype(ml_dtypes.bfloat16),
        "t": rng.standard_normal((64, 32)).astype(np.float32).T,  # not contiguous
        "mask": rng.standard_normal(7) > 0,
    }
    weights = [Weight(n, from_numpy(a.dtype), a.shape, lambda a=a: a) for n, a in arrays.items()]
    places = write_weights(tmp_path / "weights.safetensors", weights)
    data = (tmp_path / "weights.safetensors").read_bytes()
    for name, tensor in open_weights(tmp_path).items():
        offset, length = places[name]
        assert data[offset : offset + length] == arrays[name].tobytes()
        assert tensor.dtype == from_numpy(arrays[name].dtype).torch and tuple(tensor.shape) == arrays[name].shape
        assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == arrays[name].tobytes()
    assert all(places[name][0] % 64 == 0 for name in ("w", "b", "t"))


def test_one_tensor_in_memory_at_a_time(tmp_path):
    alive = []

    def load():
        gc.collect()
        assert not any(ref() is not None for ref in alive), "the tensor before is still held"
        array = np.ones((256, 256), np.float32)
        alive.append(weakref.ref(array))
        return array

    progress = []
    weights = [Weight(f"w{i}", DTYPES["float32"], (256, 256), load) for i in range(4)]
    write_weights(tmp_path / "w", weights, lambda done, total: progress.append((done, total)))
    assert len(alive) == 4 and progress[-1] == (4 << 18, 4 << 18)


def test_what_is_declared_must_be_what_comes(tmp_path):
    with pytest.raises(ValueError, match="declared float32"):
        write_weights(tmp_path / "w", [Weight("a", DTYPES["float32"], (2,), lambda: np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match="declared float32"):
        write_weights(tmp_path / "w", [Weight("a", DTYPES["float32"], (2,), lambda: np.zeros(2))])
    twice = [Weight("a", DTYPES["uint8"], (2,), lambda: np.zeros(2, np.uint8))] * 2
    with pytest.raises(ValueError, match="two weights are called a"):
        write_weights(tmp_path / "w", twice)


def test_graph_points_into_the_weights(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(values.astype(ml_dtypes.bfloat16)), dtype=ir.DataType.BFLOAT16, shape=ir.Shape((3, 4))
    )
    bf16 = ir.TensorType(ir.DataType.BFLOAT16)
    x = ir.Value(name="x", type=bf16, shape=ir.Shape(("T", 3)))
    w = ir.Value(name="layer.weight", type=bf16, shape=ir.Shape((3, 4)), const_value=lazy)
    node = ir.node("MatMul", [x, w])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = bf16, ir.Shape(("T", 4))
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 23}, name="g")
    model = ir.Model(graph, ir_version=10)
    save_graph(model, tmp_path)
    assert w.const_value is lazy, "the model in memory keeps its own tensors"
    assert (tmp_path / GRAPH_FILE).stat().st_size < 1000

    stored = load_graph(tmp_path).graph.initializers["layer.weight"].const_value
    assert isinstance(stored, ir.ExternalTensor)
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), values)
    assert open_weights(tmp_path)["layer.weight"].float().tolist() == values.tolist()
    onnx.checker.check_model(tmp_path / GRAPH_FILE)


def test_operations_per_layer():
    layer = ["Norm", "Linear", "PagedAttention", "Linear", "Act"]
    moe = ["Norm", "Linear", "PagedAttention", "Experts"]
    found = operations(["Gather", *layer, *layer, *layer, "Norm", "Head"])
    assert found["total"] == 18
    assert found["layers"] == [
        {"first": 0, "last": 2, "ops": {"Linear": 2, "Act": 1, "Norm": 1, "PagedAttention": 1}},
    ]
    assert found["outside"] == {"Gather": 1, "Norm": 1, "Head": 1}
    mixed = operations(["Gather", *layer, *moe, *moe, "Head"])
    assert [(g["first"], g["last"]) for g in mixed["layers"]] == [(0, 0), (1, 2)]
    assert "Experts" in mixed["layers"][1]["ops"] and "Experts" not in mixed["layers"][0]["ops"]
    assert operations(["Gather", "Head"])["outside"] == {"Gather": 1, "Head": 1}
