"""Requests of every kind for pycoder's tokenizer: whatever of them changes an answer, drafts must leave as it is."""

from hand_made import prompts_of
from ingot import SamplingParams

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
