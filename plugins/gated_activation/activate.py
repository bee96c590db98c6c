"""The activation functions as one Triton function, for every kernel that ends in one."""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of `ACTIVATIONS`, in fp32."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh z) / 2 = sigmoid(2z)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return tl.maximum(x, 0.0)


@triton.jit
def gate(gates, ups, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """act(gates) * ups in DTYPE, both in fp32 but rounded to it before; so is the activation before the product."""
    active = activate(gates, ACTIVATION).to(DTYPE).to(tl.float32)
    return (active * ups).to(DTYPE)
