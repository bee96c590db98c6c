"""The standard ONNX ops (opset 23) a decoder graph may still contain, in torch: `ONNX_OPS`, op name -> binder.

Passes leave some of them in a finished graph (embedding Gather, LayerNormalization, a router's TopK) and the raw export
is made of them. Element-wise ops and reductions are here, ops that move data in `onnx_movement.py`. Attributes and
constant inputs are resolved when a node is bound. Integer indices may be int32. Semantics: onnx.ai/onnx/operators.
"""

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F

from .binder import Attributes, Binder, Constants, Run
from .dtypes import TORCH_DTYPES
from .onnx_movement import MOVEMENT_OPS
from .onnx_quantise import bind_dequantize, bind_quantize


def plain(function: Run) -> Binder:
    """The binder of a function that needs no attributes."""
    return lambda attributes, constants: function


def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Integers are truncated towards zero, as ONNX (and C) does."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def power(base: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def bind_mod(attributes: Attributes, constants: Constants) -> Run:
    return torch.fmod if attributes.get("fmod") else torch.remainder


def bind_gelu(attributes: Attributes, constants: Constants) -> Run:
    approximate = attributes.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def bind_swish(attributes: Attributes, constants: Constants) -> Run:
    alpha = attributes.get("alpha", 1.0)
    return F.silu if alpha == 1.0 else lambda x: x * torch.sigmoid(alpha * x)


def bind_cast(attributes: Attributes, constants: Constants) -> Run | None:
    dtype = TORCH_DTYPES.get(attributes["to"])
    return None if dtype is None else lambda x: x.to(dtype)


def clip(x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def bind_gemm(attributes: Attributes, constants: Constants) -> Run:
    """alpha * A' @ B' + beta * C; with a transposed B (a checkpoint's own layout) it is `F.linear`."""
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    transpose_a, transpose_b = attributes.get("transA", 0), attributes.get("transB", 0)

    def gemm(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        a = a.t() if transpose_a else a
        b = b.t() if transpose_b else b
        y = a @ b
        y = y if alpha == 1.0 else y * alpha
        return y if c is None else y + (c if beta == 1.0 else c * beta)

    return gemm


def bind_softmax(attributes: Attributes, constants: Constants) -> Run:
    axis = attributes.get("axis", -1)
    return lambda x: torch.softmax(x, axis)


def bind_log_softmax(attributes: Attributes, constants: Constants) -> Run:
    axis = attributes.get("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


def bind_reduce(function: Callable[..., torch.Tensor]) -> Binder:
    """A reduction over the axes of an optional input; none given means all, or nothing with `noop_with_empty_axes`."""

    def bind(attributes: Attributes, constants: Constants) -> Run:
        keepdim, noop = bool(attributes.get("keepdims", 1)), attributes.get("noop_with_empty_axes", 0)
        fixed = constants[1].tolist() if len(constants) > 1 and constants[1] is not None else None

        def run(x: torch.Tensor, axes: torch.Tensor | None = None) -> torch.Tensor:
            dims = fixed if fixed is not None else axes.tolist() if axes is not None else []
            if not dims and noop:
                return x
            return function(x, dim=dims or list(range(x.dim())), keepdim=keepdim)

        return run

    return bind


def reduce_mean(x: torch.Tensor, dim: list[int], keepdim: bool) -> torch.Tensor:
    return x.mean(dim, keepdim=keepdim)


def reduce_sum(x: torch.Tensor, dim: list[int], keepdim: bool) -> torch.Tensor:
    return x.sum(dim, keepdim=keepdim, dtype=x.dtype)


def reduce_prod(x: torch.Tensor, dim: list[int], keepdim: bool) -> torch.Tensor:
    for axis in sorted((d % x.dim() for d in dim), reverse=True):
        x = x.prod(axis, keepdim=keepdim, dtype=x.dtype)
    return x


def bind_arg(function: Run) -> Binder:
    def bind(attributes: Attributes, constants: Constants) -> Run | None:
        axis, keepdim = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
        return None if attributes.get("select_last_index") else lambda x: function(x, dim=axis, keepdim=keepdim)

    return bind


def bind_top_k(attributes: Attributes, constants: Constants) -> Run:
    axis, largest = attributes.get("axis", -1), bool(attributes.get("largest", 1))
    ordered = bool(attributes.get("sorted", 1))
    fixed = None if constants[1] is None else int(constants[1])

    def run(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.topk(x, int(k) if fixed is None else fixed, axis, largest, ordered))

    return run


def bind_layer_norm(attributes: Attributes, constants: Constants) -> Run:
    """Rounded once, as torch's layer_norm from which the node comes; ONNX would also round before the scale."""
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)

    def run(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)

    return run


def bind_rms_norm(attributes: Attributes, constants: Constants) -> Run:
    """Normalised in the stash type (fp32 by default), rounded to x's type, then scaled."""
    axis, epsilon = attributes.get("axis", -1), attributes.get("epsilon", 1e-5)
    stash = TORCH_DTYPES[attributes.get("stash_type", 1)]

    def run(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        dims = list(range(axis % x.dim(), x.dim()))
        h = x.to(stash)
        h = h * torch.rsqrt(h.pow(2).mean(dims, keepdim=True) + epsilon)
        return h.to(x.dtype) * scale

    return run


def bind_rotary_embedding(attributes: Attributes, constants: Constants) -> Run | None:
    """RotaryEmbedding of opset 23 on [B, H, T, D] (or [B, T, H*D] with num_heads); caches [B, T, r/2], or [max, r/2]
    with position_ids."""
    interleaved, num_heads = attributes.get("interleaved", 0), attributes.get("num_heads", 0)
    rotary_dim = attributes.get("rotary_embedding_dim", 0)

    def run(
        x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        shape = x.shape
        x = x.view(shape[0], shape[1], num_heads, -1) if x.dim() == 3 else x.transpose(1, 2)  # [B, T, H, D]
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, T, 1, r/2]
        width = rotary_dim or x.shape[-1]
        rotated, rest = x[..., :width], x[..., width:]
        pairs = rotated.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        first, second = pairs.unbind(-1 if interleaved else -2)
        turned = (first * cos - second * sin, second * cos + first * sin)
        rotated = torch.stack(turned, -1 if interleaved else -2).flatten(-2)
        y = torch.cat((rotated, rest), -1)
        return y.reshape(shape) if len(shape) == 3 else y.transpose(1, 2)

    return run


def variadic(function: Run) -> Binder:
    """An op over any number of tensors, folded from the left."""
    return lambda attributes, constants: lambda *tensors: reduce(function, tensors)


PLAIN_OPS: dict[str, Run] = {  # no attributes, or none that matter to torch
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Clip": clip,
    "Cos": torch.cos,
    "Div": divide,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "IsInf": torch.isinf,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": power,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}

ONNX_OPS: dict[str, Binder] = {
    **{name: plain(function) for name, function in PLAIN_OPS.items()},
    "ArgMax": bind_arg(torch.argmax),
    "ArgMin": bind_arg(torch.argmin),
    "Cast": bind_cast,
    "CastLike": plain(lambda x, like: x.to(like.dtype)),
    "DequantizeLinear": bind_dequantize,
    "QuantizeLinear": bind_quantize,
    "Gelu": bind_gelu,
    "Gemm": bind_gemm,
    "LayerNormalization": bind_layer_norm,
    "LogSoftmax": bind_log_softmax,
    "Max": variadic(torch.maximum),
    "Min": variadic(torch.minimum),
    "Mod": bind_mod,
    "RMSNormalization": bind_rms_norm,
    "ReduceMax": bind_reduce(torch.amax),
    "ReduceMean": bind_reduce(reduce_mean),
    "ReduceMin": bind_reduce(torch.amin),
    "ReduceProd": bind_reduce(reduce_prod),
    "ReduceSum": bind_reduce(reduce_sum),
    "RotaryEmbedding": bind_rotary_embedding,
    "Softmax": bind_softmax,
    "Sum": variadic(torch.add),
    "Swish": bind_swish,
    "TopK": bind_top_k,
    **MOVEMENT_OPS,
}
