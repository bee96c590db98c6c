"""Every tactic of the Experts kernels against the reference: on the GPU where there is one, interpreted otherwise."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from ingot.plugins import OPS, tactics_of
from ingot.plugins.tactic import Site, Tensor
from triton_run import DEVICE, described, poisoned, run_tactic

GPU = DEVICE == "cuda"
# the interpreter multiplies bf16 matrices wrongly, so it is left to the GPU
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
TOLERANCE = {
    torch.float32: dict(rtol=5e-5, atol=5e-5),
    torch.float16: dict(rtol=4e-3, atol=4e-3),
    torch.bfloat16: dict(rtol=3e-2, atol=3e-2),
}
DEFAULTS = dict(activation="silu", transposed=0, interleaved=0, alpha=1.702, limit=7.0)


def made(tokens, num_experts, choices, width, inner, dtype, transposed=0, biases=False):
    """Inputs of the op: every token has `choices` different experts, route weights that sum to 1 in fp32."""
    x = torch.randn(tokens, width).to(dtype)
    route, index = torch.randn(tokens, num_experts).softmax(-1).topk(choices, -1)
    gate_up = torch.randn(num_experts, 2 * inner, width) / width**0.5
    down = torch.randn(num_experts, width, inner) / inner**0.5
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    bias = [torch.randn(num_experts, n).to(dtype) if biases else None for n in (2 * inner, width)]
    return [x, index.int(), route / route.sum(-1, keepdim=True), gate_up.to(dtype), down.to(dtype), *bias]


def site_of(inputs, **attributes):
    return Site("Experts", DEFAULTS | attributes, tuple(map(described, inputs)), (described(inputs[0]),))


def results(inputs, **attributes):
    """What each tactic makes of these inputs, by its name."""
    on_device = [None if x is None else x.to(DEVICE) for x in inputs]
    found = tactics_of("Experts")(site_of(inputs, **attributes))
    assert found and len({tactic.name for tactic in found}) == len(found)
    return {t.name: run_tactic(t, on_device, [described(inputs[0])])[0].cpu() for t in found}


def compare(inputs, rows=slice(None), **attributes):
    """`rows`: those that are compared. The reference computes in fp32: the kernels round less than it would in fp16."""
    x, index, route, *weights = inputs
    exact = [None if w is None else w.float() for w in weights]
    expected = OPS["Experts"].reference(x.float(), index, route.float(), *exact, **DEFAULTS | attributes).to(x.dtype)
    for name, ours in results(inputs, **attributes).items():
        torch.testing.assert_close(
            ours[rows], expected[rows], **TOLERANCE[x.dtype], msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed,interleaved", list(itertools.product((0, 1), (0, 1))))
def test_experts_in_each_layout(dtype, transposed, interleaved):
    """Widths that no tile divides, then ones that all do."""
    layout = dict(transposed=transposed, interleaved=interleaved)
    compare(made(3, 3, 2, 70, 37, dtype, transposed, biases=True), **layout)
    size = 256 if dtype != torch.float32 or GPU else 64
    even = made(1, 2, 1, size, size, dtype, transposed, biases=interleaved)
    assert all(dict(launch.kernel.constants).get("EVEN", True)
               for tactic in tactics_of("Experts")(site_of(even, **layout)) for launch in tactic.launches)  # fmt: skip
    compare(even, **layout)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"])
def test_each_activation(activation):
    inputs = made(4, 3, 2, 32, 32, torch.float32)
    inputs[0] *= 6  # beyond the limit
    compare(inputs, activation=activation, alpha=1.3, limit=5.0)


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_an_index_that_is_no_expert_adds_nothing(index_type):
    inputs = made(6, 4, 3, 40, 24, torch.float16)
    index = inputs[1] = inputs[1].to(index_type)
    index[0, 1], index[2], index[3, 0], index[4, 2] = 4, 4, -1, 2**31 - 1
    if index_type == torch.int64:
        index[5, 0] = 2**32 + 1  # not expert 1
    inputs[2][3, 0] = torch.nan  # nor is its weight used
    compare(inputs, rows=[0, 1, 2, 4, 5])
    for ours in results(inputs).values():
        assert ours.isfinite().all() and (ours[2] == 0).all()


def test_experts_nobody_chose_may_hold_anything():
    inputs = made(3, 8, 2, 40, 24, torch.float16)
    inputs[1] %= 2
    inputs[3][2:], inputs[4][2:] = torch.nan, torch.nan
    compare(inputs)


def test_one_expert_takes_all_tokens():
    inputs = made(37, 5, 2, 40, 24, torch.float16)
    inputs[1][:] = 3
    compare(inputs)


def test_a_row_of_nan_stays_in_its_row():
    inputs = made(9, 3, 2, 40, 24, torch.float16)
    inputs[0][4] = torch.nan
    compare(inputs, rows=[0, 1, 2, 3, 5, 6, 7, 8])


@pytest.mark.parametrize("tokens,num_experts,choices", [(1, 8, 2), (1, 1, 1), (25, 4, 3), (70, 1, 2), (33, 3, 5)])
def test_experts_at_each_number_of_rows(tokens, num_experts, choices, monkeypatch):
    """With several blocks an expert; the last two are counted in a launch of their own and have repeated choices."""
    from ingot.plugins.experts import kernel

    monkeypatch.setattr(kernel, "MANY_PAIRS", 128)
    inputs = made(tokens, max(num_experts, choices), choices, 40, 24, torch.float16)
    inputs[1] %= num_experts
    inputs[3:5] = [w[:num_experts].contiguous() for w in inputs[3:5]]
    assert (len(tactics_of("Experts")(site_of(inputs))[0].launches) == 5) == (tokens * choices > 128)
    compare(inputs)


@pytest.mark.parametrize("tokens,num_experts,choices", [(1, 128, 8), (13, 5, 3), (300, 7, 8)])
def test_pairs_are_sorted_in_their_own_order(tokens, num_experts, choices):
    """The lists themselves, so that runs do not differ: pairs of an expert ascend, and unused blocks have no owner."""
    from ingot.plugins import jit
    from ingot.plugins.tactic import Tactic

    index = torch.randint(-1, num_experts + 1, (tokens, choices), dtype=torch.int32)
    inputs = made(tokens, max(num_experts, choices), choices, 16, 8, torch.float16)
    inputs[1], inputs[3:5] = index, [w[:num_experts].contiguous() for w in inputs[3:5]]
    ways = {tactic.launches[:-3]: tactic for tactic in tactics_of("Experts")(site_of(inputs))}
    for sorting, tactic in ways.items():
        workspace = poisoned((tactic.workspace // 4,), "int32").view(torch.uint8)
        jit.launch(Tactic("sort", sorting), [x if x is None else x.to(DEVICE) for x in inputs], [], workspace)
        rows, blocks = dict(sorting[-1].kernel.constants)["BM"], sorting[-1].arguments[5]
        order, owner = (workspace[a.index :].view(torch.int32).cpu() for a in sorting[-1].arguments[2:4])
        wanted_order, wanted_owner = [], []
        for expert in range(num_experts):
            pairs = torch.where(index.flatten() == expert)[0].tolist()
            wanted_order += pairs + [-1] * (-len(pairs) % rows)
            wanted_owner += [expert] * -(-len(pairs) // rows)
        assert len(wanted_owner) <= blocks
        assert order[: len(wanted_order)].tolist() == wanted_order
        assert owner[:blocks].tolist() == wanted_owner + [-1] * (blocks - len(wanted_owner))


def test_num_blocks_is_the_most_there_can_be():
    from ingot.plugins.experts.kernel import num_blocks

    for pairs, experts, rows in itertools.product(range(1, 40), range(1, 7), (1, 3, 16)):
        # every expert but one has a single row more than whole blocks, or as few as there are pairs
        hit = min(pairs, experts)
        spare = (pairs - hit) // rows
        assert num_blocks(pairs, experts, rows) == hit + spare, (pairs, experts, rows)


def test_an_activation_that_is_not_known_has_no_tactic():
    assert tactics_of("Experts")(site_of(made(2, 3, 1, 8, 8, torch.float16), activation="tanh")) == []


@pytest.mark.skipif(not GPU, reason="sizes for a GPU")
@pytest.mark.parametrize("tokens", [1, 16, 300, 2000])
@pytest.mark.parametrize("transposed", [0, 1])
def test_large_experts(tokens, transposed):
    compare(made(tokens, 32, 4, 2880, 768, torch.bfloat16, transposed, True), transposed=transposed, interleaved=1)


def test_every_kernel_compiles_for_every_architecture():
    """In a process of its own: this one may interpret kernels instead of compiling them."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 60


def compile_every_kernel():
    """Prints how many cubins there are: first tactics of Qwen3-30B-A3B's experts and of gpt-oss's, sm_80 to sm_120."""
    from ingot.builder.targets.cubin import CAPABILITIES, compile_kernel

    def site(tokens, num_experts, choices, width, inner, **attributes):
        transposed = attributes.get("transposed", 0)
        shapes = [(tokens, width), (tokens, choices), (tokens, choices)]
        shapes += [(num_experts, width, 2 * inner), (num_experts, inner, width)] if transposed else []
        shapes += [] if transposed else [(num_experts, 2 * inner, width), (num_experts, width, inner)]
        shapes += [(num_experts, 2 * inner), (num_experts, width)] if transposed else []
        types = ["bfloat16", "int32", "float32", *["bfloat16"] * 4]
        inputs = [Tensor(shape, dtype) for shape, dtype in zip(shapes, types, strict=False)]
        return Site("Experts", DEFAULTS | attributes, (*inputs, None, None)[:7], (inputs[0],))

    oai = dict(activation="swiglu_oai", transposed=1, interleaved=1)
    sites = [site(t, 128, 8, 2048, 768) for t in (1, 64, 2048)] + [
        site(t, 32, 4, 2880, 2880, **oai) for t in (16, 2048)
    ]
    kernels = {launch.kernel for each in sites for t in tactics_of("Experts")(each)[:1] for launch in t.launches}
    count = 0
    for capability, kernel in itertools.product(CAPABILITIES, kernels):
        cubin = compile_kernel(kernel, capability)
        assert cubin.data[:4] == b"\x7fELF" and cubin.shared <= 227 << 10, kernel
        count += 1
    print(count, "cubins")


if __name__ == "__main__":
    compile_every_kernel()
