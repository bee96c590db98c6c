"""A batch of all kinds of requests, and all that a user sees of its answers: drafts must not change any of it."""

import shutil

import torch
from hand_made import DEMO, prompts_of
from ingot import SamplingParams
from safetensors.torch import load_file, save_file

PROMPTS = [*prompts_of(5, 60, 5), *([prompts_of(6, 45, 1)[0]] * 2)]
KINDS = [
    {"temperature": 0, "max_tokens": 24},
    {"temperature": 0.9, "top_p": 0.8, "max_tokens": 30, "logprobs": 2, "stop": ["self", "\n\n"]},
    {"temperature": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "min_tokens": 9, "max_tokens": 22},
    {"temperature": 0.8, "top_k": 20, "n": 2, "max_tokens": 17, "logit_bias": {13: 2.0}, "prompt_logprobs": 1},
    {"temperature": 0.6, "structured_outputs": {"regex": "[a-z]{4,30}( = [0-9]{2,9})?"}, "max_tokens": 20},
    {"temperature": 0, "max_tokens": 25, "speculate": False},
    {"temperature": 0, "max_tokens": 21, "ignore_eos": True, "stop_token_ids": [199, 12]},
]
PARAMS = [SamplingParams(seed=11 + i, **kind) for i, kind in enumerate(KINDS)]
ROOMY = {"max_num_seqs": 9}
TIGHT = {"max_num_seqs": 5, "page_size": 4, "num_kv_pages": 32, "max_num_batched_tokens": 24}  # thrown out and chunked


def told(llm):
    """Everything that a user sees but times, of a batch of all kinds; twice, so that prefixes are found: answers, and
    log-probabilities by token of each of their places and of the prompts'."""
    found, logprobs = [], []
    for _ in range(2):
        for output in llm.generate(PROMPTS, PARAMS, progress=False):
            for answer in output.outputs:
                found.append((answer.token_ids, answer.text, answer.finish_reason, answer.stop_reason))
                logprobs += [{t: p.logprob for t, p in entry.items()} for entry in answer.logprobs or ()]
            logprobs += [e and {t: p.logprob for t, p in e.items()} for e in output.prompt_logprobs or ()]
    return found, logprobs


def answers(llm):
    """The same to be compared as it is."""
    found, logprobs = told(llm)
    return found, [entry and {t: round(p, 3) for t, p in entry.items()} for entry in logprobs]


def half_right(folder):
    """A checkpoint that is often right about pycoder-draft-2m, though not always: without its last layer's MLP."""
    shutil.copytree(DEMO / "pycoder-draft-2m", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros_like(weights["model.layers.1.mlp.down_proj.weight"])
    save_file(weights, folder / "model.safetensors")
    return folder
