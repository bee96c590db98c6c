"""`--load-format dummy` on a driver that keeps the GPU's memory on the host: numbers that a model can be run with."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from fake_driver import FakeDriver
from ingot.engines.weights import GRAPH_FILE, WEIGHTS_FILE
from ingot.plugins import gpu as gpus
from ingot.runtime.cuda.weights import Weights

TYPES = {"bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT, "fp8": ir.DataType.FLOAT8E4M3FN,
         "fp8_too": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8, "index": ir.DataType.INT32}  # fmt: skip


@pytest.fixture
def engine(tmp_path):
    """A folder with the graph alone: its weights are places in a file that is not there."""
    values = [
        ir.Value(name=name, shape=ir.Shape((40, 8)), type=ir.TensorType(kind), const_value=ir.ExternalTensor(
            WEIGHTS_FILE, 0, int(320 * kind.itemsize), kind, shape=ir.Shape((40, 8)), name=name, base_dir=tmp_path))
        for name, kind in TYPES.items()
    ]  # fmt: skip
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / GRAPH_FILE)
    return SimpleNamespace(folder=tmp_path)


def test_numbers_are_finite_and_indices_are_zero(engine, monkeypatch):
    driver = FakeDriver()
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    weights = Weights(gpus.Gpu(), engine, dummy=True)
    kinds = {"bf16": ml_dtypes.bfloat16, "fp32": np.float32, "fp8": ml_dtypes.float8_e4m3fn,
             "fp8_too": ml_dtypes.float8_e4m3fn, "int8": np.int8, "index": np.int32}  # fmt: skip
    found = {}
    for name, kind in kinds.items():
        data = driver.read(weights.addresses[name], 320 * np.dtype(kind).itemsize)
        found[name] = np.frombuffer(data, kind).astype(np.float32)
        assert np.isfinite(found[name]).all(), name
    assert not found["index"].any()
    assert all(found[name].std() > 0 for name in kinds if name != "index")
    assert 0.5 < found["fp8"].std() < 2 and 0.5 < found["fp8_too"].std() < 2 and found["bf16"].std() < 0.1
