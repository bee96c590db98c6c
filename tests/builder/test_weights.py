"""The load plan gives what `from_pretrained` loads: stored as is, cast, tied, or put together from single experts."""

import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES
from hand_made import DEMO
from ingot import BuildConfig, build_engine
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.empty_model import empty_model
from ingot.builder.export import export
from ingot.builder.passes import optimise
from ingot.builder.weights import attach, load_plan, unread
from ingot.engines.errors import BuildError
from ingot.plugins.dtypes import to_torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def save(family, folder, **options):
    config = FAMILIES[family]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, **options)
    return model


def plan_of(folder, dtype):
    checkpoint = Checkpoint.open(str(folder))
    return load_plan(checkpoint, empty_model(checkpoint.config, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_plan_equals_from_pretrained(family, dtype, tmp_path):
    save(family, tmp_path, max_shard_size="150KB")
    plan = plan_of(tmp_path, dtype)
    state = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert plan.keys() == state.keys()
    for name, expected in state.items():
        found = to_torch(plan[name])
        assert found.dtype == dtype
        assert torch.equal(found, expected.to(dtype)), name


def test_experts_were_stored_one_by_one(tmp_path):
    """What makes the test above test fusing."""
    save("qwen3_moe", tmp_path)
    stored = Checkpoint.open(str(tmp_path)).stored
    assert "model.layers.0.mlp.experts.5.gate_proj.weight" in stored
    assert not any("gate_up" in name for name in stored)


def test_eleven_experts_are_in_numerical_order(tmp_path):
    """Expert 10 comes after expert 9, not after expert 1."""
    config = FAMILIES["qwen3_moe"]()
    config.num_experts = 11
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(to_torch(plan_of(tmp_path, torch.float32)[name]), model.state_dict()[name])


WRITE_WEIGHTS = """
import sys
from pathlib import Path
import onnx_ir as ir
import torch
from ingot.builder.checkpoint import Checkpoint
from ingot.builder.empty_model import empty_model
from ingot.builder.passes.packed_weights import pack, parts_of
from ingot.builder.weights import attach, load_plan
from ingot.engines.weights import save_graph

def peak():
    # not ru_maxrss, which starts at what the process that called exec had
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10

def graph_of(checkpoint, dtype):
    plan = load_plan(checkpoint, empty_model(checkpoint.config, dtype), dtype)
    weights = [ir.Value(name=n, type=ir.TensorType(t.dtype), shape=t.shape) for n, t in plan.items() if "proj" in n]
    graph = ir.Graph([], [], nodes=[], initializers=weights, opset_imports={"": 23}, name="g")
    attach(ir.Model(graph, ir_version=10), plan)
    for gate in [weight for weight in weights if "gate_proj" in weight.name]:
        up = graph.initializers[gate.name.replace("gate_proj", "up_proj")]
        for weight in (gate, up):
            graph.initializers.pop(weight.name)
        pack(graph, [*parts_of(gate), *parts_of(up)], gate)
    return ir.Model(graph, ir_version=10)

folder = Path(sys.argv[1])
graphs = [graph_of(Checkpoint.open(str(folder)), dtype) for dtype in (torch.bfloat16, torch.float16)]
before = peak()
for graph in graphs:
    save_graph(graph, folder)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_weights_written_are_not_kept(tmp_path):
    """24 tensors of 8 MiB, two thirds packed in pairs, as stored and cast: at no time are a third of them resident.

    Four or five are, and now and then six: when the kernel takes freed pages back is its own affair.
    """
    tensor, num_layers = 8 << 20, 8
    config = FAMILIES["llama"]()
    config.update(dict(hidden_size=2048, intermediate_size=2048, num_hidden_layers=num_layers, head_dim=8))
    config.save_pretrained(tmp_path)
    state = empty_model(config, torch.bfloat16).state_dict()
    save_file({n: torch.zeros(t.shape, dtype=t.dtype) for n, t in state.items()}, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 3 * num_layers * tensor
    command = [sys.executable, "-c", WRITE_WEIGHTS, str(tmp_path)]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folders of its last three runs
    assert int(child.stdout) / tensor < num_layers


def test_no_weight_is_read_before_it_is_asked_for(tmp_path):
    """Once the headers are known, export and passes do without the files."""
    save("llama", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    graph = optimise(export(checkpoint, "float32"))
    weight = graph.graph.initializers["model.layers.0.mlp.down_proj.weight"].const_value
    with pytest.raises(FileNotFoundError):
        weight.numpy()


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_head_from_either_name(tmp_path, kept):
    model = save("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, kept: embedding}, file)
    plan = plan_of(tmp_path, torch.float32)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(to_torch(plan[name]), model.state_dict()[name])


def test_tied_but_stored_twice(tmp_path):
    """Which of two that differ is meant nobody knows; transformers unties them, other servers take the embedding."""
    save("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    plan_of(tmp_path, torch.float32)
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, file)
    with pytest.raises(BuildError, match="'lm_head.weight' and 'model.embed_tokens.weight' with different numbers"):
        plan_of(tmp_path, torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_a_model_does_not_read(tmp_path, family):
    """A config with fewer layers, or without the biases that are stored, makes another model than the one meant."""
    save(family, tmp_path)
    assert unread(Checkpoint.open(str(tmp_path))) == []
    file = tmp_path / "model.safetensors"
    more = {
        "model.layers.0.self_attn.q_proj.my_bias": torch.ones(4),
        "model.layers.9.mlp.up_proj.weight": torch.ones(4),
    }
    save_file(load_file(file) | more | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    assert unread(Checkpoint.open(str(tmp_path))) == sorted(more)


@pytest.mark.parametrize("family, lost", [("llama", "model.layers.1.mlp.up_proj.weight"), ("mixtral", "experts.2.w1")])
def test_missing_weight(tmp_path, family, lost):
    save(family, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if lost not in name}, file)
    with pytest.raises(BuildError, match="lacks|config.json says"):
        plan_of(tmp_path, torch.float32)


def test_weight_of_another_shape(tmp_path):
    save("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(63)}, file)
    with pytest.raises(BuildError, match=r"'model.norm.weight' of shape \[63\], its config.json says \[64\]"):
        plan_of(tmp_path, torch.float32)


def test_exported_checkpoint_reads_the_files(tmp_path):
    model = save("qwen2", tmp_path)
    graph = export(Checkpoint.open(str(tmp_path)), "bfloat16")
    state = model.state_dict()
    weights = {name: value for name, value in graph.graph.initializers.items() if name in state}
    assert weights.keys() == state.keys() - {"lm_head.weight"}, "the tied head is one initialiser"
    for name, value in weights.items():
        assert value.dtype == value.const_value.dtype == ir.DataType.BFLOAT16
        assert torch.equal(to_torch(value.const_value), state[name].bfloat16())


def test_attach_names_what_is_missing():
    value = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    graph = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 23}), ir_version=10)
    with pytest.raises(BuildError, match="'w'"):
        attach(graph, {})
    attach(graph, {"w": torch.tensor([1.0, 2.0])})
    assert to_torch(value.const_value).tolist() == [1.0, 2.0]


def damage(folder, name, at, number):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[at] = number
    save_file(tensors, file)


@pytest.mark.parametrize(
    "family, name, read, at, number, words",
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", None, -1, torch.nan, "1 NaN and 0 infinite"),
        ("llama", "model.norm.weight", None, 0, -torch.inf, "0 NaN and 1 infinite"),
        ("qwen3_moe", "model.layers.0.mlp.experts.5.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_proj", 7,
         torch.inf, "0 NaN and 1 infinite"),
        ("llama", "model.layers.1.mlp.up_proj.weight", None, 3, 7e4, "to 7e.04, and float16 holds none above 6.55e.04"),
        ("llama", "model.layers.1.mlp.up_proj.weight", None, 3, 65504, None),
    ],
)  # fmt: skip
def test_weights_that_are_not_finite(tmp_path, family, name, read, at, number, words):
    save(family, tmp_path)
    damage(tmp_path, name, at, number)
    plan = plan_of(tmp_path, torch.float16)
    if words is None:
        assert to_torch(plan[name]).isfinite().all()
        return
    with pytest.raises(BuildError, match=f"weight '{read or name}' has .*{words}"):
        to_torch(plan[read or name])
    others = [other for other in plan if other not in (read or name, "lm_head.weight")]
    assert all(to_torch(plan[other]).isfinite().all() for other in others)


def test_tied_weights_that_are_not_finite(tmp_path):
    """A NaN is not equal to itself, but that is not what is wrong with it."""
    save("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 5] = torch.nan
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    with pytest.raises(BuildError, match="has 1 NaN"):
        plan_of(tmp_path, torch.float32)


def test_a_build_of_weights_that_are_not_finite_leaves_nothing(tmp_path):
    pytest.importorskip("triton")  # for cuda, which compiles nothing before the weights are written
    model = tmp_path / "model"
    shutil.copytree(DEMO / "pycoder-draft-2m", model)
    damage(model, "model.layers.1.self_attn.v_proj.weight", 11, torch.nan)  # a part of a packed weight
    with pytest.raises(BuildError, match="'model.layers.1.self_attn.v_proj.weight' has 1 NaN .*; download"):
        build_engine(BuildConfig(str(model), str(tmp_path / "out" / "engine"), "cuda", gpu_arch=90))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
