"""Softmax, ReduceSum, TopK and LayerNormalization over the last axis on the GPU: one program a row, held in registers.

Arithmetic is in fp32 and rounded once. TopK turns value and index into one integer that sorts as ONNX asks (the larger
value first, of equals the lower index), so that k maxima over unique keys are the answer whatever the row holds.
"""

from math import prod

import triton
import triton.language as tl

from ..pdl import begin
from ..tactic import POINTERS, Kernel, Launch, Operand, Site, Tactic, Tensor

FLOATS = ("float32", "bfloat16", "float16")
WIDEST = 32768  # a row must fit in the registers of a program
WIDEST_TOP_K, MOST_TOP_K = 1024, 32


@triton.jit
def softmax_kernel(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    begin(PDL)
    at = tl.program_id(0).to(tl.int64) * WIDTH
    i = tl.arange(0, BLOCK)
    h = tl.load(x + at + i, mask=i < WIDTH, other=-float("inf")).to(tl.float32)
    h = tl.exp(h - tl.max(h, 0))
    tl.store(y + at + i, tl.div_rn(h, tl.zeros_like(h) + tl.sum(h, 0)).to(y.dtype.element_ty), mask=i < WIDTH)


@triton.jit
def reduce_sum_kernel(x, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    h = tl.load(x + row * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + row, tl.sum(h, 0).to(y.dtype.element_ty))


@triton.jit
def layer_norm_kernel(
    x, scale, bias, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPSILON: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    at = tl.program_id(0).to(tl.int64) * WIDTH
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    h = tl.load(x + at + i, mask=inside, other=0.0).to(tl.float32)
    h = tl.where(inside, h - tl.sum(h, 0) / WIDTH, 0.0)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / WIDTH + EPSILON)
    h *= tl.load(scale + i, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        h += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at + i, h.to(y.dtype.element_ty), mask=inside)


@triton.jit
def top_k_kernel(
    x, values, indices, WIDTH: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    LOW: tl.constexpr = -(1 << 63)
    h = tl.load(x + row * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    h = tl.where(h == 0.0, 0.0, h)  # -0.0 equals 0.0
    h = tl.where(h != h, float("nan"), h)  # NaN is the largest, as torch has it
    bits = h.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # now sorts as the value does
    keys = (bits.to(tl.int64) << 32) | (BLOCK - 1 - i).to(tl.int64)
    keys = tl.where(i < WIDTH, keys, LOW)
    j = tl.arange(0, BLOCK_K)
    best = tl.zeros([BLOCK_K], tl.int64)
    for rank in range(K):
        key = tl.max(keys, 0)
        best = tl.where(j == rank, key, best)
        keys = tl.where(keys == key, LOW, keys)
    bits = (best >> 32).to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    value = bits.to(tl.float32, bitcast=True)
    index = BLOCK - 1 - (best & 0xFFFFFFFF)
    tl.store(values + row * K + j, value.to(values.dtype.element_ty), mask=j < K)
    tl.store(indices + row * K + j, index.to(indices.dtype.element_ty), mask=j < K)


def tactics(site: Site) -> list[Tactic]:
    """One launch of a program a row; [] for another axis than the last, or a row that registers do not hold."""
    x = site.inputs[0]
    assert x is not None
    if not x.shape or 0 in x.shape or x.dtype not in FLOATS or x.shape[-1] > WIDEST:
        return []
    attributes, rank = site.attributes, len(x.shape)
    if site.op != "ReduceSum" and attributes.get("axis", -1) not in (-1, rank - 1):
        return []
    if site.op == "Softmax":
        return _rows(site, "softmax_kernel", {"x": 0}, {"y": 0}, {})
    if site.op == "ReduceSum":
        # the axes are not read: the output's shape tells
        kept = x.shape[:-1] + ((1,) if attributes.get("keepdims", 1) else ())
        return _rows(site, "reduce_sum_kernel", {"x": 0}, {"y": 0}, {}) if site.outputs[0].shape == kept else []
    if site.op == "LayerNormalization" and len(site.outputs) == 1:
        bias = len(site.inputs) > 2 and site.inputs[2] is not None
        constants = {"EPSILON": attributes.get("epsilon", 1e-5), "BIAS": bias}
        return _rows(site, "layer_norm_kernel", {"x": 0, "scale": 1, "bias": 2 if bias else 1}, {"y": 0}, constants)
    if site.op == "TopK" and attributes.get("largest", 1) and len(site.outputs) == 2:
        k = site.outputs[0].shape[-1]
        if 0 < k <= min(MOST_TOP_K, x.shape[-1]) and x.shape[-1] <= WIDEST_TOP_K:
            constants = {"K": k, "BLOCK_K": triton.next_power_of_2(k)}
            return _rows(site, "top_k_kernel", {"x": 0}, {"values": 0, "indices": 1}, constants)
    return []


def _rows(
    site: Site, function: str, inputs: dict[str, int], outputs: dict[str, int], constants: dict[str, object]
) -> list[Tactic]:
    """A launch of `function` on these inputs and outputs, argument name -> index, then constants."""
    named: dict[str, Tensor | None] = {n: site.inputs[at] for n, at in inputs.items()}
    named |= {n: site.outputs[at] for n, at in outputs.items()}
    shape = named["x"].shape if named["x"] else ()
    width, block = shape[-1], triton.next_power_of_2(shape[-1])
    signature = tuple((name, POINTERS[tensor.dtype]) for name, tensor in named.items() if tensor)
    kernel = Kernel(
        f"reduce.kernel:{function}",
        signature,
        (("WIDTH", width), ("BLOCK", block), *constants.items()),
        num_warps=min(16, max(1, block // 512)),
        divisible=tuple(named) if width % 16 == 0 and site.op != "ReduceSum" else (),
    )
    arguments = (*(Operand("input", at) for at in inputs.values()), *(Operand("output", at) for at in outputs.values()))
    return [Tactic("rows", (Launch(kernel, (prod(shape[:-1]), 1, 1), arguments),))]
