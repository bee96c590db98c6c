"""What the plugins of the tensorrt target launch: every op that can enter a graph, by `enqueue`, against its meaning.

Without a GPU in Triton's interpreter, by the addresses that `enqueue` hands over; on a GPU from real cubins, captured
in CUDA graphs. So lowering, plan, argument places and the plugin itself are compared with what the graph says. TensorRT
calls none of it here, and need not be installed.
"""

import pytest
import torch
from families import FAMILIES
from tensorrt_build import recipe_of, write_graph
from tensorrt_run import (
    Enqueued,
    HostGpu,
    lowered,
    plan_of,
    quantised,
    run_steps,
    without_cubins,
    without_tensorrt,  # noqa: F401
)
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

from ingot.builder.targets.tensorrt.lowering import LOWERINGS
from ingot.engines.weights import load_graph, open_weights
from ingot.plugins import gpu as gpus
from ingot.plugins.tactic import Device

GPU = torch.cuda.is_available()
EVERY = tuple(op for op in LOWERINGS if GPU or op != "Linear")  # takes minutes in the interpreter
FP8, INT8 = "dtype: fp8_e4m3", "dtype: int8"
ATTENTION = {"RotaryCosSin", "RotaryPagedAttention"}
# model, ops that stay plugins, recipe, pages -> ops that are launched
CASES = {
    "every op": ("mistral", EVERY, None, {}, {*ATTENTION, *EVERY} - {"Rope", "QuantiseTokens"}),
    "rotated before": ("qwen3", ("RMSNorm", "Rope"), None, {}, {"RotaryCosSin", "RMSNorm", "Rope", "PagedAttention"}),
    "fp8": ("mistral", ("QuantiseTokens",), recipe_of(FP8, FP8), dict(pages="fp8_e4m3"),
            {"RotaryCosSin", "PagedAttention", "QuantiseTokens"}),
    "int8": ("mistral", EVERY, recipe_of(INT8, INT8), dict(pages="int8", per_head=True),
             {*ATTENTION, *EVERY} - {"Rope"}),
    "experts": ("gpt_oss", ("Rope",), None, {}, {*ATTENTION, "Experts"}),
    # the interpreter has seen their like
    "usual": ("mistral", ("Rope",), None, {}, ATTENTION),
    "fp8 pages": ("mistral", ("Rope",), None, dict(pages="fp8_e4m3", per_head=True), ATTENTION),
    "int8 pages": ("mistral", (), None, dict(pages="int8"), {"RotaryCosSin", "PagedAttention"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """(name, dtype) -> graph in ingot's ops and its weights."""
    known = {}

    def get(name, dtype):
        if (name, dtype) not in known:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = FAMILIES[name]()
            config.num_hidden_layers, config.layer_types = 1, (getattr(config, "layer_types", None) or [])[:1] or None
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():  # logits that differ
                parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1)
            model.save_pretrained(folder / "checkpoint")
            write_graph(folder / "checkpoint", folder, dtype)
            known[name, dtype] = load_graph(folder), open_weights(folder)
        return known[name, dtype]

    return get


def check(case, whole, model, enqueued, found, device, bound):
    for logits, expected in run_steps(whole, model, enqueued, found, device):
        off = (logits.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
        assert off < bound, case
    assert enqueued.ran.keys() == CASES[case][-1]


@pytest.mark.skipif(GPU, reason="the interpreter's memory is the host's")
@pytest.mark.parametrize("case", list(CASES)[:5])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter
def test_enqueue_computes_what_the_op_does(graphs, case, monkeypatch, tmp_path):
    name, plugins, recipe, pages, _ = CASES[case]
    whole = quantised(*graphs(name, "float32"), recipe, **pages)
    model, made = lowered(whole[0], plugins), without_cubins(monkeypatch)
    found, saved = plan_of(model, Device(89, 8), tmp_path)
    launcher = HostGpu(list(made[-1].kernels)).launcher(found, saved, tmp_path, monkeypatch)
    check(case, whole, model, Enqueued(found, launcher), found, "cpu", 0.01 if pages else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_enqueue_in_a_cuda_graph(graphs, case, dtype, tmp_path):
    """The same on a GPU: real cubins, device buffers, each `enqueue` captured in a CUDA graph and replayed twice."""
    from ingot.plugins.tensorrt.launcher import Launcher

    name, plugins, recipe, pages, _ = CASES[case]
    whole = quantised(*graphs(name, dtype), recipe, **pages)
    model, gpu = lowered(whole[0], plugins), gpus.Gpu()
    found, saved = plan_of(model, gpu.device, tmp_path)
    launcher, stream = Launcher(gpu, tmp_path, found.plan, saved), gpu.stream()

    def captured(enqueue):
        torch.cuda.synchronize()
        made = gpu.capture(lambda: enqueue(stream), stream)
        for _ in range(2):  # nothing of the first is left to mislead the second
            gpu.replay(made, stream)
        gpu.synchronise(stream)
        gpu.discard(made)

    check(case, whole, model, Enqueued(found, launcher, captured), found, "cuda",
          0.1 if dtype == "bfloat16" else 0.01 if pages else 1e-3)  # fmt: skip
    gpu.release()
