"""Tactics of PagedAttention as machine code: for every GPU they compile, fit it, and are what they ought to be."""

import re

import pytest

pytest.importorskip("triton")

from ingot.builder.targets.cubin import Cubin, compile_all
from ingot.builder.targets.sass import disassembled
from ingot.engines.errors import BuildError
from ingot.plugins import tactics_of
from ingot.plugins.paged_attention.kernel import tactics
from ingot.plugins.paged_attention.launches import Shape
from ingot.plugins.tactic import Device, Site, Tensor
from triton_run import some_of


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("pages", ["bfloat16", "int8", "float8_e4m3fn"])
def test_every_tactic_compiles(capability, pages):
    """Llama-3.1-8B in bf16, decode and chunk; each kernel fits the shared memory."""

    def bf16(*shape):
        return Tensor(shape, "bfloat16")

    def i32(*shape):
        return Tensor(shape, "int32")

    attributes = {"layer": 0, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128,
                  "scale": 128**-0.5, "window": 0, "softcap": 0.0}  # fmt: skip
    kernels = set()
    steps = [(4, 4, 1, 0), (256, 16, None, 0), (8, 8, 8, 0), *([(32, 2, 16, 1)] if pages == "bfloat16" else [])]
    for tokens, sequences, max_query, tree in steps:
        pools, scale = Tensor((1000, 16, 8, 128), pages), None if pages == "bfloat16" else Tensor((8,), "float32")
        inputs = (bf16(tokens, 6144), None, None, i32(tokens), i32(sequences + 1), i32(sequences), i32(sequences, 512),
                  pools, pools, None, scale, scale, i32(tokens) if tree else None)  # fmt: skip
        site = Site("PagedAttention", {**attributes, "window": 100 * tree}, inputs, (bf16(tokens, 4096),),
                    Device(capability), max_query)  # fmt: skip
        found = tactics(site) if pages == "bfloat16" and not tree else some_of(tactics(site), 1)
        kernels |= {launch.kernel for tactic in found for launch in tactic.launches}
    assert len(kernels) >= (4 if pages == "bfloat16" else 2), "a choice for decode and one for chunks"
    if pages == "float8_e4m3fn":
        inputs = (bf16(4, 6144), bf16(4, 128), i32(4), i32(5), i32(4), i32(4, 512), pools, pools, None, scale, scale)
        rotation = {**attributes, "rotary_offset": 0, "interleaved": 0}
        site = Site("RotaryPagedAttention", rotation, inputs, (bf16(4, 4096),), Device(capability), 1)
        kernels.add(tactics_of(site.op)(site)[-1].launches[0].kernel)
        assert any("short" in kernel.function for kernel in kernels)
    for kernel, cubin in compile_all(kernels, capability).items():
        assert isinstance(cubin, Cubin) and cubin.data[:4] == b"\x7fELF", (kernel, cubin)


@pytest.mark.parametrize("capability,dtype", [(86, "bfloat16"), (120, "float32")])
def test_wide_heads_have_a_tactic_on_every_gpu(capability, dtype):
    """Gemma's heads of 256 on GPUs with 99 KiB of shared memory: a tactic fits by what its cubins really take."""

    def tensor(*shape, dtype=dtype):
        return Tensor(shape, dtype)

    attributes = {"layer": 0, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "v_head_dim": 256,
                  "scale": 0.06, "window": 0, "softcap": 0.0}  # fmt: skip
    for tokens, max_query in ((8, 1), (64, None), (8, 8)):
        step = (tensor(size, dtype="int32") for size in (tokens, 9, 8))
        pools = (tensor(1, 16, 4, 256),) * 2
        inputs = (tensor(tokens, 16 * 256), None, None, *step, tensor(8, 64, dtype="int32"), *pools, None)
        found = tactics(
            Site("PagedAttention", attributes, inputs, (tensor(tokens, 2048),), Device(capability), max_query)
        )
        compiled = compile_all({launch.kernel for tactic in found for launch in tactic.launches}, capability)
        fitting = {kernel for kernel, cubin in compiled.items() if isinstance(cubin, Cubin)}
        assert all(cubin.shared <= 99 << 10 for cubin in compiled.values() if isinstance(cubin, Cubin))
        assert any(all(launch.kernel in fitting for launch in tactic.launches) for tactic in found), max_query


def prompts_over_int8(dim, v_dim):
    """In fp16, on an H100: keys that earlier steps left are converted, in a loop of their own."""

    def i32(*shape):
        return Tensor(shape, "int32")

    pools = [Tensor((40, 8, 2, width), "int8") for width in (dim, v_dim)]
    scales = Tensor((1,), "float32"), Tensor((2,), "float32")
    query = Tensor((33, 8 * dim + 2 * v_dim), "float16")
    inputs = (query, None, None, i32(33), i32(6), i32(5), i32(5, 8), *pools, None, *scales, None)
    attributes = {"layer": 0, "num_heads": 6, "num_kv_heads": 2, "head_dim": dim, "v_head_dim": v_dim,
                  "scale": dim**-0.5, "window": 0, "softcap": 0.0}  # fmt: skip
    return Site("PagedAttention", attributes, inputs, (Tensor((33, 6 * v_dim), "float16"),), Device(90, 8), None)


@pytest.mark.parametrize("dim, v_dim", [(32, 16), (64, 64), (128, 128)])
def test_no_matrix_operand_is_lost(dim, v_dim):
    kernels = {tactic.launches[1].kernel for tactic in some_of(tactics(prompts_over_int8(dim, v_dim)), 3)}
    for kernel, cubin in compile_all(kernels, 90).items():
        assert isinstance(cubin, Cubin), (kernel, cubin)


def test_a_lost_matrix_operand_is_found():
    """What is left out is what ptxas gets wrong; one that does not would let it be put in again."""
    kernel = Shape.of(prompts_over_int8(32, 16), None).chunk(64, 64, 4, 2, skip_decode=False).kernel
    cubin = compile_all([kernel], 90)[kernel]
    assert isinstance(cubin, BuildError) and "an operand is lost" in str(cubin)


def fused_with_a_neighbours(code):
    """Products that a thread adds, unrounded, to a neighbour's rounded one: the two hold different sums then."""
    product, shuffled, found = {}, {}, []
    for line in code.splitlines():
        if not (match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*) (.*?);", line)):
            continue
        name, operands = match[1], [each.strip().replace(".reuse", "") for each in match[2].split(",")]
        if name.startswith("SHFL"):
            shuffled[operands[1]] = product.get(operands[2])
            continue
        if name.startswith("FFMA") and shuffled.get(operands[3]) == frozenset(operands[1:3]):
            found.append(line.strip())
        product.pop(operands[0], None)
        shuffled.pop(operands[0], None)
        if name.startswith("FMUL"):
            product[operands[0]] = frozenset(operands[1:3])
    return found


def test_all_threads_round_a_total_alike():
    """Shares of a sequence are merged by many threads, which then write what they hold to one place."""

    def tensor(dtype, *shape):
        return Tensor(shape, dtype)

    attributes = {"layer": 0, "num_heads": 10, "num_kv_heads": 2, "head_dim": 96, "v_head_dim": 96,
                  "scale": 0.1, "window": 0, "softcap": 0.0}  # fmt: skip
    step = (tensor("int32", size) for size in (20, 6, 5))
    pools = (tensor("float16", 40, 32, 2, 96),) * 2
    inputs = (tensor("float16", 20, 14 * 96), None, None, *step, tensor("int32", 5, 20), *pools, tensor("float16", 10))
    site = Site("PagedAttention", attributes, inputs, (tensor("float16", 20, 960),), Device(90), 8)
    kernels = {launch.kernel for tactic in tactics(site) for launch in tactic.launches}
    kernels = {kernel for kernel in kernels if kernel.function.endswith("decode_kernel")}
    assert len(kernels) >= 2
    for kernel, cubin in compile_all(kernels, 90).items():
        assert isinstance(cubin, Cubin), cubin
        code = disassembled(cubin.data)
        assert "SHFL.BFLY" in code and not fused_with_a_neighbours(code), kernel
