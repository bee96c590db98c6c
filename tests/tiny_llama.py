"""A random Llama that calibration takes no time for, and some text for it."""

import torch
from hand_made import llama_graph
from ingot.builder.calibration_text import Text
from ingot.builder.node_major import Windows

CONFIG = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4})  # fmt: skip
VOCAB, WIDE = 304, 96


def tiny(num_layers=4):
    """A random Llama in bf16, its head tied to the embedding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    weights = {"model.embed_tokens.weight": random(VOCAB, 64), "model.norm.weight": 1 + random(64)}
    for i in range(num_layers):
        shapes = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
                  "self_attn.o_proj": (64, 64), "mlp.gate_proj": (WIDE, 64), "mlp.up_proj": (WIDE, 64),
                  "mlp.down_proj": (64, WIDE)}  # fmt: skip
        weights |= {f"model.layers.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        weights |= {f"model.layers.{i}.{name}_layernorm.weight": 1 + random(64)
                    for name in ("input", "post_attention")}  # fmt: skip
    return llama_graph({**CONFIG, "num_hidden_layers": num_layers}, weights, "bfloat16")


def text():
    """Four windows to calibrate with, three to check with."""
    tokens = torch.randint(3, VOCAB, (7, 24), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Text((Windows(tokens[:2]), Windows(tokens[2:4])), (Windows(tokens[4:6]), Windows(tokens[6:])))
