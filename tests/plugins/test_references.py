"""The other ops against independent formulations: float64 for values, transformers' own modules for rounding."""

import math

import onnx
import pytest
import torch
from ingot.engines.errors import EngineError
from ingot.plugins import OPS
from torch.testing import assert_close
from transformers import Cohere2Config, GptOssConfig, LlamaConfig, MixtralConfig
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama import modeling_llama
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmo2 import modeling_olmo2

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # one rounding, relative
ONNX = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float16: onnx.TensorProto.FLOAT16,
}

linear, rms_norm = OPS["Linear"].reference, OPS["RMSNorm"].reference
rotary_cos_sin, rope = OPS["RotaryCosSin"].reference, OPS["Rope"].reference
gated_activation, experts = OPS["GatedActivation"].reference, OPS["Experts"].reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias):
    x, weight = torch.randn(7, 37).to(dtype), torch.randn(13, 37).to(dtype)
    offset = torch.randn(13).to(dtype) if bias else None
    y = torch.einsum("tk,nk->tn", x.double(), weight.double()) + (offset.double() if bias else 0)
    assert_close(linear(x, weight, offset).double(), y, rtol=EPSILON[dtype], atol=20 * EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "norm, attributes",
    [
        (modeling_llama.LlamaRMSNorm, {}),
        (Gemma2RMSNorm, {"weight_offset": 1.0}),
        (modeling_olmo2.Olmo2RMSNorm, {"fp32_multiply": 1}),
    ],
    ids=["llama", "gemma", "olmo2"],
)
def test_rms_norm_rounds_as_transformers(norm, attributes, dtype):
    theirs = norm(33, eps=1e-5).to(dtype)
    torch.nn.init.normal_(theirs.weight)
    x = torch.randn(9, 33).to(dtype) * 3
    assert torch.equal(rms_norm(x, theirs.weight, epsilon=1e-5, **attributes), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_per_head_and_residual(dtype):
    x, residual, weight = torch.randn(5, 4 * 11).to(dtype), torch.randn(5, 44).to(dtype), torch.randn(11).to(dtype)
    y, total = rms_norm(x, weight, residual, epsilon=1e-6)
    assert torch.equal(total, x + residual)
    heads = total.double().view(5, 4, 11)
    expected = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_close(y.double().view(5, 4, 11), expected, rtol=2 * EPSILON[dtype], atol=EPSILON[dtype])


def angles(num_positions, width):
    inv_freq = 1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)
    return torch.randint(0, 3000, (num_positions,), dtype=torch.int32), inv_freq


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_cos_sin_is_transformers(dtype):
    theirs = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    positions = torch.randint(0, 4000, (9,), dtype=torch.int32)
    cos, sin = theirs(torch.zeros(1, dtype=dtype), positions[None])
    ours = rotary_cos_sin(positions, theirs.inv_freq, dtype=ONNX[dtype])
    assert torch.equal(ours, torch.cat((cos[0, :, :8], sin[0, :, :8]), -1))
    scaled = rotary_cos_sin(positions, theirs.inv_freq, dtype=1, attention_scaling=0.25)
    assert torch.equal(scaled, 0.25 * rotary_cos_sin(positions, theirs.inv_freq, dtype=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "olmo2", "cohere2", "glm4"])
def test_rope_rounds_as_transformers(family, dtype):
    """Packed q|k|v; Cohere 2 and GLM-4 interleaved, GLM-4 partial, OLMo 2 and Cohere 2 in fp32."""
    heads, kv_heads, dim, tokens = 4, 2, 16, 5
    width = 8 if family == "glm4" else dim
    positions, inv_freq = angles(tokens, width)
    x = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    parts = x.split((heads * dim, kv_heads * dim, kv_heads * dim), -1)
    q, k, v = (part.view(1, tokens, -1, dim).transpose(1, 2) for part in parts)
    wide = positions[None, :, None].float() * inv_freq  # [1, T, r/2]
    interleaved = family == "cohere2"
    wide = wide.repeat_interleave(2, -1) if interleaved else torch.cat((wide, wide), -1)
    table_dtype = torch.float32 if family == "olmo2" else dtype
    modules = {"llama": modeling_llama, "olmo2": modeling_olmo2, "cohere2": modeling_cohere2, "glm4": modeling_glm4}
    q, k = modules[family].apply_rotary_pos_emb(q, k, wide.cos().to(table_dtype), wide.sin().to(table_dtype))
    expected = torch.cat([part.transpose(1, 2).reshape(tokens, -1) for part in (q, k, v)], -1)

    cos_sin = rotary_cos_sin(positions, inv_freq, dtype=ONNX[table_dtype])
    cos_sin = cos_sin.float() if family == "cohere2" else cos_sin
    before = x.clone()
    y = rope(x, cos_sin, num_heads=heads + kv_heads, head_dim=dim, interleaved=int(family in ("cohere2", "glm4")))
    assert torch.equal(x, before), "the input was modified"
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_cohere2_rotary_is_what_the_contract_says():
    """The test above spells Cohere 2's cos and sin itself; this ties that spelling to its module."""
    theirs = modeling_cohere2.Cohere2RotaryEmbedding(Cohere2Config(hidden_size=64, num_attention_heads=4))
    positions = torch.arange(6, dtype=torch.int32)
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = rotary_cos_sin(positions, theirs.inv_freq, dtype=1).repeat_interleave(2, -1)
    assert torch.equal(ours, torch.cat((cos[0], sin[0]), -1))


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope_offset_is_a_complex_rotation(interleaved):
    """With an offset, as DeepSeek's k: pairs as complex numbers, the other columns untouched."""
    heads, dim, offset, width = 3, 14, 5, 6
    positions, inv_freq = angles(4, width)
    x = torch.randn(4, heads * dim + 9)
    y = rope(
        x, rotary_cos_sin(positions, inv_freq, dtype=1), num_heads=heads, head_dim=dim,
        interleaved=interleaved, rotary_offset=offset,
    )  # fmt: skip
    expected = x.clone()
    turn = torch.polar(torch.ones(4, width // 2).double(), positions[:, None].double() * inv_freq.double())
    for h in range(heads):
        start = h * dim + offset
        real = range(start, start + width, 2) if interleaved else range(start, start + width // 2)
        imaginary = [i + (1 if interleaved else width // 2) for i in real]
        z = torch.complex(x[:, list(real)].double(), x[:, imaginary].double()) * turn
        expected[:, list(real)], expected[:, imaginary] = z.real.float(), z.imag.float()
    assert_close(y, expected, rtol=0, atol=5e-4)  # fp32 angles up to 3000 radians
    untouched = [h * dim + i for h in range(heads) for i in range(dim) if not offset <= i < offset + width]
    assert torch.equal(y[:, untouched], x[:, untouched]) and torch.equal(y[:, heads * dim :], x[:, heads * dim :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation(activation, dtype):
    x = torch.randn(6, 2 * 17).to(dtype)
    gate, up = x[:, :17].double(), x[:, 17:].double()
    act = {
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "relu": lambda z: z * (z > 0),
    }[activation]
    y = gated_activation(x, activation=activation)
    assert_close(y.double(), act(gate) * up, rtol=2 * EPSILON[dtype], atol=EPSILON[dtype])


def test_unknown_activation_is_refused():
    with pytest.raises(EngineError, match="'mish'"):
        gated_activation(torch.zeros(1, 2), activation="mish")


def routed(tokens, num_experts, top_k, dtype):
    weight, index = torch.randn(tokens, num_experts).softmax(-1).topk(top_k, -1)
    return index, weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_is_mixtrals(dtype):
    config = MixtralConfig(hidden_size=24, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = MixtralExperts(config).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(11, 24).to(dtype)
    index, weight = routed(11, 6, 2, torch.float32)
    y = experts(x, index.int(), weight, theirs.gate_up_proj, theirs.down_proj, activation="silu")
    assert_close(y, theirs(x, index, weight), rtol=2 * EPSILON[dtype], atol=2 * EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_is_gpt_oss(dtype):
    config = GptOssConfig(hidden_size=24, intermediate_size=20, num_local_experts=5, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, 24).to(dtype) * 8  # far enough to reach the limit
    index, weight = routed(7, 5, 3, dtype)
    theirs.requires_grad_(False)
    y = experts(
        x, index, weight, theirs.gate_up_proj, theirs.down_proj, theirs.gate_up_proj_bias, theirs.down_proj_bias,
        activation="swiglu_oai", transposed=1, interleaved=1, alpha=theirs.alpha, limit=theirs.limit,
    )  # fmt: skip
    expected = theirs(x, router_indices=index, routing_weights=weight)
    assert_close(y, expected, rtol=4 * EPSILON[dtype], atol=float(expected.abs().max()) * 2 * EPSILON[dtype])


def test_experts_skips_what_was_not_hit():
    """Experts nobody chose may hold anything, and an index of E or more adds nothing."""
    gate_up, down = torch.randn(4, 2 * 6, 8) / 8**0.5, torch.randn(4, 8, 6) / 6**0.5
    gate_up[3], down[3] = math.nan, math.nan
    x, index = torch.randn(5, 8), torch.tensor([[0, 1], [2, 4], [1, 0], [0, 2], [4, 4]])
    weight = torch.rand(5, 2)
    y = experts(x, index, weight, gate_up, down, activation="relu")
    expected = torch.zeros(5, 8, dtype=torch.float64)
    for t in range(5):
        for e, w in zip(index[t].tolist(), weight[t].tolist(), strict=True):
            if e < 4:
                gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
                expected[t] += w * (down[e].double() @ (gate.relu() * up))
    assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
