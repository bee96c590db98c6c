"""Heads that are right now and then, and what heads draft on the cuda target beside what plain torch makes of them."""

import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from heads import drafts, write_head, write_medusa
from ingot.runtime.speculation.tree import Tree
from ingot.runtime.speculation.verify import holding
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def write_fitted(folder: Path, target: Path, kind: str) -> Path:
    """A head that is right now and then: what it says is a linear function of the target's states, fitted to what the
    target writes."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.inference_mode():
        text = model.generate(torch.randint(4, 4096, (64, 8)), do_sample=True, max_new_tokens=56, eos_token_id=None)
        states, embedding = model(text, output_hidden_states=True).hidden_states, model.get_input_embeddings().weight
    last, width = states[-1], states[-1].shape[-1]

    def fitted(x: torch.Tensor, behind: int) -> torch.Tensor:
        """x [B, T, .., ] -> the last states so many tokens later, the weight of a product."""
        x = x[:, : last.shape[1] - behind].flatten(0, 1)
        return torch.linalg.lstsq(x, last[:, behind:].flatten(0, 1)).solution.T.contiguous()

    if kind == "medusa":
        tensors = write_medusa(folder, target, num=3, blocks=1, style="pt")
        for i in range(3):
            tensors[f"{i}.0.linear.weight"].mul_(0.05)
            tensors[f"{i}.1.weight"] = embedding @ fitted(last, 1 + i)
        torch.save(tensors, folder / "medusa_lm_head.pt")
        return folder
    file = write_head(folder, target, kind, draft_vocab=4000 if kind == "eagle3" else 0) / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "o_proj" in name or "down_proj" in name or name == "fc.bias":
            tensors[name] *= 0.05
    if kind == "eagle3":
        tensors |= {"lm_head.weight": embedding[torch.arange(4000) + tensors["d2t"]], "norm.weight": torch.ones(width)}
        tensors["fc.weight"] = fitted(torch.cat([states[i] for i in (2, 1, 0)], -1), 1)
    else:
        tensors["fc.weight"] = fitted(torch.cat([embedding[text.roll(-1, 1)], last], -1), 1)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return folder


def recorded(llm, instead=lambda tokens, guesses: guesses):
    """Fills with (tokens of a request, guesses of what follows) as the cuda target drafts; `instead` of these, others
    may be handed on."""
    drafting, seen = llm._session.executor._drafting, []
    settle = drafting.settle

    def record(batch, tokens, guesses):
        found = settle(batch, tokens, guesses)
        for known, work in zip(batch.ahead.known, guesses.works, strict=True) if guesses else ():
            mine = batch.sample_works == work
            if batch.drafts is not None:
                mine &= holding(tokens, batch.drafts, batch.nodes)
            seen.append(([*known, *tokens[mine].tolist()], found[work]))
            found[work] = instead(*seen[-1])
        return found

    drafting.settle = record
    return seen


def what_comes(prompts, answers):
    """(tokens) -> what follows them, where a request's text is one of these; else nothing."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    return lambda tokens: next((text[len(tokens) :] for text in texts if text[: len(tokens)] == tokens), [])


def often_right(prompts, answers):
    """For `recorded`: none, some or all guesses are the truth instead."""
    coming, turn = what_comes(prompts, answers), itertools.count()
    return lambda tokens, guesses: [*coming(tokens)[: (1, 2, 0, 3)[next(turn) % 4]], *guesses][: len(guesses)]


def often_in_trees(prompts, answers):
    """For `recorded`: trees of three with the truth on their likeliest path, beside it, or on a path of its own."""
    coming, turn = what_comes(prompts, answers), itertools.count()

    def call(tokens, guesses):
        truth = coming(tokens)[:2]
        if len(truth) < 2 or not isinstance(guesses, Tree):
            return guesses
        wrong = [2 if token != 2 else 3 for token in truth]
        match next(turn) % 4:
            case 0:  # wrong, the first beside it
                return Tree([wrong[0], 4, truth[0]], [-1, 0, -1])
            case 1:  # right, then wrong, the second beside that
                return Tree([truth[0], wrong[1], truth[1]], [-1, 0, 0])
            case 2:
                return Tree([wrong[0], *truth], [-1, -1, 1])
        return guesses

    return call


def drafter(kind: str, folder: Path, model, reads: tuple[int, ...]):
    """(tokens, number) -> guesses of the head in `folder` for a transformers model, in plain torch."""
    tensors = torch.load(folder / "medusa_lm_head.pt") if kind == "medusa" else load_file(folder / "model.safetensors")
    config, embedding = json.loads((folder / "config.json").read_text()), model.get_input_embeddings().weight

    @torch.inference_mode()
    def call(tokens: list[int], num: int) -> list[int]:
        states = model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        if kind == "medusa":
            return [
                medusa_guess(tensors, i, states[reads[0]][0, -1]) for i in range(min(num, config["medusa_num_heads"]))
            ]
        features = torch.cat([states[i][0] for i in reads], -1)
        return drafts(tensors, config, features, tokens, num, embedding)

    return call


def medusa_guess(tensors: dict, number: int, x: torch.Tensor) -> int:
    """Of one of Medusa's heads, of a block each, at the target's state x [width]."""
    x = x + F.silu(F.linear(x, tensors[f"{number}.0.linear.weight"], tensors[f"{number}.0.linear.bias"]))
    return int(F.linear(x, tensors[f"{number}.1.weight"]).argmax())
