"""A whole Llama written by hand in ingot's ops, against transformers: prompts in chunks, decode, all in mixed steps.

This is the shape of graph the passes aim at; it shows that the ops together mean what the contract says.
"""

import onnx_ir as ir
import pytest
import torch
from ingot.engines import step
from ingot.plugins.interpreter import Program
from onnx import TensorProto, helper
from transformers import LlamaConfig, LlamaForCausalLM

PAGE_SIZE, WIDTH = 4, 12
CONFIG = LlamaConfig(
    hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    vocab_size=61, tie_word_embeddings=False, attn_implementation="eager",
)  # fmt: skip
HEADS = dict(num_heads=6, num_kv_heads=2, head_dim=8, v_head_dim=8, scale=8**-0.5)
ELEMENT = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16}


def llama(dtype):
    """The transformers model, and the same weights in a graph of 9 nodes a layer and 5 more."""
    model = LlamaForCausalLM(CONFIG).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    weights = {"inv_freq": model.model.rotary_emb.inv_freq, "norm": model.model.norm.weight.data}
    weights |= {"embed": model.model.embed_tokens.weight.data, "head": model.lm_head.weight.data}
    nodes = []

    def op(kind, inputs, *outputs, domain="ingot", **attributes):
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    x, branch = op("Gather", ["embed", "tokens"], "x", domain=""), None
    op("RotaryCosSin", ["positions", "inv_freq"], "cos_sin", dtype=ELEMENT[dtype])
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        packed = [attention.q_proj, attention.k_proj, attention.v_proj]
        weights |= {
            f"qkv{i}": torch.cat([p.weight.data for p in packed]),
            f"o{i}": attention.o_proj.weight.data,
            f"gate_up{i}": torch.cat((mlp.gate_proj.weight.data, mlp.up_proj.weight.data)),
            f"down{i}": mlp.down_proj.weight.data,
            f"norm_a{i}": layer.input_layernorm.weight.data,
            f"norm_b{i}": layer.post_attention_layernorm.weight.data,
        }
        eps = CONFIG.rms_norm_eps
        if branch is None:
            h = op("RMSNorm", [x, f"norm_a{i}"], f"a{i}", epsilon=eps)
        else:
            h, x = op("RMSNorm", [branch, f"norm_a{i}", x], f"a{i}", f"ra{i}", epsilon=eps), f"ra{i}"
        h = op("Linear", [h, f"qkv{i}"], f"h{i}")
        h = op("Rope", [h, "cos_sin"], f"r{i}", num_heads=8, head_dim=8)
        batch = [step.SLOTS, step.QUERY_START, step.KV_LEN, step.PAGES, step.k_pages(i), step.v_pages(i)]
        h = op("PagedAttention", [h, "", "", *batch], f"att{i}", layer=i, **HEADS)
        h = op("Linear", [h, f"o{i}"], f"p{i}")
        h, x = op("RMSNorm", [h, f"norm_b{i}", x], f"b{i}", f"rb{i}", epsilon=eps), f"rb{i}"
        h = op("GatedActivation", [op("Linear", [h, f"gate_up{i}"], f"gu{i}")], f"g{i}", activation="silu")
        branch = op("Linear", [h, f"down{i}"], f"d{i}")
    h = op("RMSNorm", [branch, "norm", x], "n", epsilon=CONFIG.rms_norm_eps)
    op("Linear", [op("Gather", [h, step.LOGIT_ROWS], "rows", domain=""), "head"], step.LOGITS)

    pools = [f(i) for i in range(CONFIG.num_hidden_layers) for f in (step.k_pages, step.v_pages)]
    infos = [helper.make_tensor_value_info(name, TensorProto.INT32, None) for name in step.STEP_INPUTS]
    infos += [helper.make_tensor_value_info(name, ELEMENT[dtype], None) for name in [*pools, *weights]]
    graph = helper.make_graph(nodes, "llama", infos, [helper.make_empty_tensor_value_info(step.LOGITS)])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ingot", 1)]
    graph = ir.from_proto(helper.make_model(graph, opset_imports=opsets))
    for value in [value for value in graph.graph.inputs if value.name in weights]:
        graph.graph.inputs.remove(value)
        value.const_value = ir.tensor([0.0], name=value.name)
        graph.graph.register_initializer(value)
    return model, Program(graph, weights), pools


class Sequences:
    """Feeds chunks of sequences, as a scheduler would: scattered pages, NaN where nothing was written."""

    def __init__(self, prompts, pools, dtype):
        self.prompts, self.done = prompts, [0] * len(prompts)
        pages = torch.randperm(len(prompts) * WIDTH, dtype=torch.int32) + 1
        self.tables = pages.view(len(prompts), WIDTH)
        shape = (len(prompts) * WIDTH + 1, PAGE_SIZE, 2, 8)
        self.pools = {name: torch.full(shape, torch.nan, dtype=dtype) for name in pools}

    def step(self, chunks):
        """chunks: sequence -> tokens to compute. Returns the graph's inputs; every token's logits are wanted."""
        position, slot, token = [], [], []
        for s, count in chunks.items():
            for p in range(self.done[s], self.done[s] + count):
                position.append(p)
                slot.append(int(self.tables[s, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE)
                token.append(int(self.prompts[s][p]))
            self.done[s] += count
        inputs = {
            step.TOKENS: token,
            step.POSITIONS: position,
            step.SLOTS: slot,
            step.QUERY_START: [0, *torch.tensor(list(chunks.values())).cumsum(0).tolist()],
            step.KV_LEN: [self.done[s] for s in chunks],
            step.LOGIT_ROWS: list(range(len(token))),
        }
        inputs = {name: torch.tensor(values, dtype=torch.int32) for name, values in inputs.items()}
        table = self.tables[list(chunks)].clone()
        for row, s in enumerate(chunks):
            table[row, -(-self.done[s] // PAGE_SIZE) :] = 0
        return {**inputs, step.PAGES: table, **self.pools}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@torch.inference_mode()
def test_mixed_steps_equal_transformers(dtype, tolerance):
    model, program, pools = llama(dtype)
    assert len(program.launches) == 9 * CONFIG.num_hidden_layers + 5
    prompts = [torch.randint(0, CONFIG.vocab_size, (n,)) for n in (23, 9, 40)]
    sequences = Sequences(prompts, pools, dtype)
    logits = {s: [] for s in range(len(prompts))}
    steps = [{0: 7}, {1: 4, 0: 6}, {0: 1, 1: 1, 2: 33}, {2: 1, 0: 1, 1: 1}, {1: 3, 0: 8, 2: 5}, {2: 1}]
    for chunks in steps:
        y = program(sequences.step(chunks))[step.LOGITS]
        assert not y.isnan().any()
        for s, part in zip(chunks, y.split(list(chunks.values())), strict=True):
            logits[s].append(part)
    for s, prompt in enumerate(prompts):
        expected = model(prompt[None]).logits[0]
        ours = torch.cat(logits[s])
        assert ours.shape == expected.shape
        error = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance, f"sequence {s}: {error:.2e}"
