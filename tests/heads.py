"""Heads of random weights in the published formats, and what they draft, in plain torch, for tests."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

EPSILON = 1e-5


def write_head(
    folder: Path, target: Path, kind: str, draft_vocab: int = 0, pickled: bool = False, bias: bool = True, **changes
) -> Path:  # fmt: skip
    """A checkpoint of a random head for the target, a Llama's checkpoint."""
    config = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1, "rms_norm_eps": EPSILON}
    config |= changes
    width, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer, read = ("midlayer", 2 * width) if kind == "eagle3" else ("layers.0", width)
    shapes = {f"{layer}.self_attn.q_proj": (queries, read), f"{layer}.self_attn.k_proj": (keys, read),
              f"{layer}.self_attn.v_proj": (keys, read), f"{layer}.self_attn.o_proj": (width, queries),
              f"{layer}.mlp.gate_proj": (inner, width), f"{layer}.mlp.up_proj": (inner, width),
              f"{layer}.mlp.down_proj": (width, inner), f"{layer}.post_attention_layernorm": (width,),
              "fc": (width, (3 if kind == "eagle3" else 2) * width)}  # fmt: skip
    if kind == "eagle3":
        config["draft_vocab_size"] = rows = draft_vocab or config["vocab_size"]
        shapes |= {"midlayer.hidden_norm": (width,), "midlayer.input_layernorm": (width,), "norm": (width,),
                   "lm_head": (rows, width)}  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
        + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    if kind == "eagle3":
        ids = torch.randperm(config["vocab_size"], generator=generator)[:rows].sort().values
        tensors |= {"d2t": ids - torch.arange(rows), "t2d": torch.zeros(config["vocab_size"]).index_fill(0, ids, 1) > 0}
    if bias:
        tensors["fc.bias"] = torch.randn(width, generator=generator)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def write_medusa(folder: Path, target: Path, num: int, blocks: int, style: str) -> dict[str, torch.Tensor]:
    """Random Medusa heads, as their authors (`pt`) or vLLM write them; the tensors by their authors' names."""
    config = json.loads((target / "config.json").read_text())
    width, generator, tensors = config["hidden_size"], torch.Generator().manual_seed(4), {}
    for i in range(num):
        for j in range(blocks):
            tensors[f"{i}.{j}.linear.weight"] = torch.randn(width, width, generator=generator) * width**-0.5
            tensors[f"{i}.{j}.linear.bias"] = torch.randn(width, generator=generator)
        tensors[f"{i}.{blocks}.weight"] = torch.randn(config["vocab_size"], width, generator=generator)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": num, "medusa_num_layers": blocks}))
    if style == "pt":
        torch.save(tensors, folder / "medusa_lm_head.pt")
        return tensors
    split = {name: name.split(".") for name in tensors}
    names = {name: f"lm_heads.{p[0]}.weight" if p[2] == "weight" else f"blocks.{p[0]}.layers.{p[1]}.{p[3]}"
             for name, p in split.items()}  # fmt: skip
    save_file({names[name]: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def medusa_logits(tensors: dict, state: torch.Tensor, num: int, blocks: int) -> list[torch.Tensor]:
    """What each head says, `state` being the target's at the token before the newest."""
    found = []
    for i in range(num):
        x = state
        for j in range(blocks):
            x = x + F.silu(F.linear(x, tensors[f"{i}.{j}.linear.weight"], tensors[f"{i}.{j}.linear.bias"]))
        found.append(F.linear(x, tensors[f"{i}.{blocks}.weight"]))
    return found


def drafts(head: dict, config: dict, features: torch.Tensor, tokens: list[int], num: int, *rest) -> list[int]:
    """What a head guesses to follow `tokens`, as `logprobs_after`."""
    found: list[int] = []
    for _ in range(num):
        found.append(int(logprobs_after(head, config, features, tokens, found, *rest).argmax()))
    return found


def logprobs_after(
    head: dict, config: dict, features: torch.Tensor, tokens: list[int], path: list[int], embedding: torch.Tensor
) -> torch.Tensor:
    """What a head says of the token after `tokens` [n] and the guesses of `path`, by the target's vocabulary.

    features [n - 1, width]: of the target, at all tokens but the last. embedding: the target's, if the head has none.
    """
    eagle3 = "midlayer.hidden_norm.weight" in head
    layer = "midlayer" if eagle3 else "layers.0"
    states = F.linear(features, head["fc.weight"], head.get("fc.bias")) if eagle3 else features
    for i in range(len(path) + 1):
        read = head.get("embed_tokens.weight", embedding)[torch.tensor(tokens[1:])]
        if eagle3:
            x, normed = states, norm(states, head["midlayer.hidden_norm.weight"])
            y = torch.cat((norm(read, head["midlayer.input_layernorm.weight"]), normed), -1)
        else:
            x = y = F.linear(torch.cat((read, states), -1), head["fc.weight"], head.get("fc.bias"))
        x = x + attention(y, {n: head[f"{layer}.self_attn.{n}_proj.weight"] for n in "qkvo"}, config)
        y = norm(x, head[f"{layer}.post_attention_layernorm.weight"])
        gate, up = (F.linear(y, head[f"{layer}.mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, head[f"{layer}.mlp.down_proj.weight"])
        logits = F.linear(norm(x[-1], head["norm.weight"]), head["lm_head.weight"]) if eagle3 else embedding @ x[-1]
        tokens, states = [*tokens, *path[i : i + 1]], torch.cat((states, x[-1:]))
    if not eagle3:
        return logits.log_softmax(-1)
    ids = torch.arange(len(logits)) + head["d2t"]
    return torch.full((len(embedding),), -torch.inf).index_copy(0, ids, logits.log_softmax(-1))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


def attention(y: torch.Tensor, weights: dict, config: dict) -> torch.Tensor:
    dim, num = config["head_dim"], len(y)
    q, k, v = (F.linear(y, weights[n]).view(num, -1, dim).transpose(0, 1) for n in "qkv")  # [H, n, D]
    angles = torch.arange(num)[:, None] * config["rope_parameters"]["rope_theta"] ** -(torch.arange(0, dim, 2) / dim)
    q, k = (turn(x, angles) for x in (q, k))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = (q @ k.transpose(1, 2) * dim**-0.5).masked_fill(torch.ones(num, num).triu(1) > 0, -torch.inf)
    return F.linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(num, -1), weights["o"])


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
