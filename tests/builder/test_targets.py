"""The cpu target: kernels where there is a compiler, a complete engine and the reason where there is none."""

import onnx_ir as ir
import pytest
from ingot.builder import BuildConfig
from ingot.builder.targets import target_of
from ingot.engines.errors import BuildError
from ingot.plugins import native

CONFIG = BuildConfig("model", "out")


@pytest.fixture
def graph():
    return ir.Model(ir.Graph([], [], nodes=[], name="empty"), ir_version=10)


def test_cpu_puts_the_kernels_into_its_folder(graph, tmp_path):
    with target_of("cpu").begin(CONFIG) as compile:
        info = compile(graph, None, tmp_path)
    if info["kernels"] == "torch":
        pytest.skip(info["reason"])
    assert info["kernels"] == "native"
    assert isinstance(native.load(tmp_path / "cpu"), native.Kernels)


def test_without_a_compiler_torch_serves(graph, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with target_of("cpu").begin(CONFIG) as compile:
        info = compile(graph, None, tmp_path)
    assert info["kernels"] == "torch" and "no C++ compiler" in info["reason"]
    assert not list(tmp_path.iterdir())


def test_no_such_target():
    with pytest.raises(BuildError, match="'cpu'"):
        target_of("abacus")
