"""The cpu target: kernels where there is a compiler, a complete engine and the reason where there is none; what it
makes of a quantised graph."""

import errno
import shutil

import onnx_ir as ir
import pytest
import torch
from hand_made import DEMO
from ingot.builder import BuildConfig
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.export import export
from ingot.builder.node_major import Windows
from ingot.builder.passes import optimise
from ingot.builder.quantise import quantise
from ingot.builder.retarget import check_options
from ingot.builder.targets import Audience, target_of
from ingot.calibration.recipe import parse
from ingot.calibration.scales import Scales
from ingot.engines.errors import BuildError
from ingot.engines.step import LOGITS
from ingot.engines.weights import WEIGHTS_FILE, load_graph, open_weights, save_graph
from ingot.engines.writer import engine_directory
from ingot.plugins import native
from ingot.plugins.interpreter import Program

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


def test_a_compiler_that_fails_is_told_of(graph, tmp_path, monkeypatch):
    """As where the disk of temporary files is full: a build that says nothing of it would make a slow engine."""
    (compiler := tmp_path / "c++").write_text("#!/bin/sh\necho No space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    notes = []
    with target_of("cpu").begin(CONFIG, Audience(note=notes.append)) as compile:
        compile(graph, None, tmp_path)
    assert len(notes) == 1 and "no native kernels" in notes[0] and "No space left" in notes[0]


def test_kernels_that_find_the_disk_full(graph, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def compile_nothing(folder):
        folder.mkdir()
        for name in (native.LIBRARY, native.RECORD):
            (folder / name).write_text("")
        return native.NativeBuild(folder / native.LIBRARY, "c++", (), (), 0.0)

    monkeypatch.setattr(native, "compile", compile_nothing)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BuildError, match="is full"), target_of("cpu").begin(CONFIG) as compile:
        with engine_directory(tmp_path / "e") as folder:
            compile(graph, None, folder)


@pytest.mark.parametrize("option", [{"quant": "fp8"}, {"kv_cache": "int8"}, {"hidden_states": "eagle3"}])
def test_what_an_engine_cannot_become_any_more(tmp_path, option):
    with pytest.raises(BuildError, match=f"--{next(iter(option)).replace('_', '-')} was given with --retarget"):
        check_options(BuildConfig("", str(tmp_path), **option))


def test_no_such_target():
    with pytest.raises(BuildError, match="'cpu'"):
        target_of("abacus")


MIXED = """
perplexity: 1
rules:
  - {match: '*.self_attn.*', method: rtn, format: {dtype: int4, group: 64, symmetric: false}}
  - {match: '*.layers.0.mlp.*', method: rtn, format: {dtype: fp8_e4m3}}
  - {match: '*.mlp.*', method: rtn, format: {dtype: int8}}
"""


@pytest.mark.parametrize("compiler", [True, False], ids=["native", "torch"])
def test_a_quantised_graph_is_lowered_beside_its_weights(compiler, tmp_path, monkeypatch):
    """Its logits are those of `model.onnx`, with kernels and without; its weights are the engine's, INT4 in few bytes.

    Three groups of 64 columns: the zero points of two rows share a byte of the file.
    """
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    graph = optimise(export(Checkpoint.open(str(DEMO / "pycoder-draft-2m")), torch.float32))
    quantise(graph, parse(MIXED, "mixed", "mixed.yaml"), Scales())
    save_graph(graph, tmp_path)
    with target_of("cpu").begin(CONFIG) as compile:
        compile(graph, None, tmp_path)
    whole, lowered = load_graph(tmp_path), load_graph(tmp_path / "cpu")
    ops = [node.op_type for node in lowered.graph]
    assert ops.count("QuantisedLinear") == 4 * 2 and "DequantizeLinear" not in ops
    assert {path.name for path in (tmp_path / "cpu").iterdir()} <= {"model.onnx", native.LIBRARY, native.RECORD}
    for value in lowered.graph.initializers.values():  # the relative path leads to the engine's file
        assert (tmp_path / "cpu" / value.const_value.location).resolve() == tmp_path / WEIGHTS_FILE
    kernels = native.load(tmp_path / "cpu")
    assert not isinstance(kernels, native.Kernels) or compiler
    weights, windows = open_weights(tmp_path), Windows(torch.randint(3, 4096, (2, 9), dtype=torch.int32))
    binders = kernels.binders if isinstance(kernels, native.Kernels) else None

    def logits(model, binders):
        pools = {v.name: torch.zeros(2, 9, *(d for d in v.shape if isinstance(d, int)))
                 for v in model.graph.inputs if "pages." in v.name}  # fmt: skip
        return Program(model, weights, binders)({**windows.inputs(), **pools})[LOGITS]

    torch.testing.assert_close(logits(lowered, binders), logits(whole, None), rtol=1e-3, atol=1e-3)
