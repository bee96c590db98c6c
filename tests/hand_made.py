"""A Llama engine cast by hand from the contract's ops, so that the runtime is tested without the builder."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from ingot.engines.dtypes import DTYPES
from ingot.engines.manifest import BuildRecord, KVLayer, Manifest, ModelInfo
from ingot.engines.weights import save_graph
from ingot.engines.writer import engine_directory
from safetensors.torch import load_file

DEMO = Path(__file__).parents[1] / "engines/demo"
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def cast_llama(checkpoint: Path, out: Path, dtype: str = "float32", hidden_states: tuple[int, ...] = ()) -> Path:
    """The engine of a Llama checkpoint (tied head, no RoPE scaling) in `out`; `hidden_states`: those that it gives."""
    config = json.loads((checkpoint / "config.json").read_text())
    weights = {name: w.to(getattr(torch, dtype)) for name, w in load_file(checkpoint / "model.safetensors").items()}
    with engine_directory(out) as folder:
        save_graph(llama_graph(config, weights, dtype, hidden_states), folder)
        for name in TEXT_FILES:
            shutil.copy(checkpoint / name, folder)
        heads, dim = config["num_key_value_heads"], config["head_dim"]
        model = ModelInfo(
            source=str(checkpoint), architecture="LlamaForCausalLM", model_type="llama",
            num_parameters=sum(w.numel() for w in weights.values()), dtype=dtype, vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
            max_model_len=config["max_position_embeddings"], eos_token_ids=(config["eos_token_id"],), bos_token_id=0,
        )  # fmt: skip
        Manifest(
            model=model, kv_layers=(KVLayer(heads, dim, dim),) * model.num_layers, target="cpu", target_info={},
            build=BuildRecord("2026-01-01T00:00:00Z", 0.0), ingot_version="test", hidden_states=hidden_states,
        ).save(folder)  # fmt: skip
    return out


def llama_graph(
    config: dict, weights: dict[str, torch.Tensor], dtype: str, hidden_states: tuple[int, ...] = ()
) -> ir.Model:
    """Of a checkpoint's config and tensors."""
    onnx_type, numpy_type = DTYPES[dtype].onnx, DTYPES[dtype].numpy
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    nodes, initializers = [], {}

    def value(name, kind=ir.DataType.INT32, shape=("T",)):
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))

    def weight(name, tensor, kind=None):
        tensor = tensor.contiguous()
        array = (
            tensor.numpy()
            if kind
            else tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy().view(numpy_type)
        )  # noqa: E501
        found = value(name, kind or onnx_type, array.shape)
        found.const_value = ir.Tensor(array, name=name)
        initializers[name] = found
        return found

    def op(kind, *inputs, domain="ingot", outputs=1, **attributes):
        node = ir.node(kind, inputs, attributes=attributes, domain=domain, num_outputs=outputs)
        node.name = f"{kind}.{len(nodes)}"
        for i, output in enumerate(node.outputs):
            output.name = f"{node.name}.{i}"
        nodes.append(node)
        return node.outputs if outputs > 1 else node.outputs[0]

    steps = {name: value(name) for name in ("tokens", "positions", "slots", "kv_len", "logit_rows")}
    steps["query_start"], steps["pages"] = value("query_start", shape=("S1",)), value("pages", shape=("S", "P"))
    pools = []
    embedding = weight("embedding", weights["model.embed_tokens.weight"])
    inv_freq = config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
    table = op(
        "RotaryCosSin", steps["positions"], weight("inv_freq", inv_freq, ir.DataType.FLOAT), dtype=int(onnx_type)
    )
    x, epsilon = op("Gather", embedding, steps["tokens"], domain="", axis=0), config["rms_norm_eps"]
    update, states = None, []
    for i in range(config["num_hidden_layers"]):
        w = {k.split(f"layers.{i}.")[1]: v for k, v in weights.items() if f".layers.{i}." in k}
        norm = weight(f"{i}.norm1", w["input_layernorm.weight"])
        if update is None:
            y = op("RMSNorm", x, norm, epsilon=epsilon)
        else:
            y, x = op("RMSNorm", update, norm, x, outputs=2, epsilon=epsilon)
        states.append(x)
        packed = torch.cat([w[f"self_attn.{p}_proj.weight"] for p in "qkv"])
        qkv = op("Linear", y, weight(f"{i}.qkv", packed))
        qkv = op("Rope", qkv, table, num_heads=heads + kv_heads, head_dim=dim)
        pair = [value(f"{p}_pages.{i}", onnx_type, ("pages", "page", kv_heads, dim)) for p in "kv"]
        pools += pair
        y = op(
            "PagedAttention", qkv, None, None, *(steps[n] for n in ("slots", "query_start", "kv_len", "pages")), *pair,
            layer=i, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=dim, scale=dim**-0.5,
        )  # fmt: skip
        update = op("Linear", y, weight(f"{i}.o", w["self_attn.o_proj.weight"]))
        y, x = op("RMSNorm", update, weight(f"{i}.norm2", w["post_attention_layernorm.weight"]), x, outputs=2,
                  epsilon=epsilon)  # fmt: skip
        both = weight(f"{i}.gate_up", torch.cat([w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]]))
        y = op("GatedActivation", op("Linear", y, both), activation="silu")
        update = op("Linear", y, weight(f"{i}.down", w["mlp.down_proj.weight"]))
    y, x = op("RMSNorm", update, weight("norm", weights["model.norm.weight"]), x, outputs=2, epsilon=epsilon)
    states.append(y)
    x = op("Gather", x, steps["logit_rows"], domain="", axis=0)
    logits = op("Linear", op("RMSNorm", x, initializers["norm"], epsilon=epsilon), embedding)
    logits.name = "logits"
    for i in hidden_states:
        states[i].name = f"hidden_states.{i}"
    graph = ir.Graph(
        [*steps.values(), *pools], [logits, *(states[i] for i in hidden_states)], nodes=nodes,
        initializers=list(initializers.values()), name="llama", opset_imports={"": 23, "ingot": 1},
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def greedy(model, prompt: list[int], num: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def prompts_of(length_from: int, length_to: int, num: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of random lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 4096, rng.integers(length_from, length_to + 1)).tolist() for _ in range(num)]
