"""What scheduling must not change: cold against warm prefix, batched against alone, preempted against not.

fp32, greedy, pycoder-14m over the project's own documents (which the model has never seen).
"""

from pathlib import Path

import pytest
import torch
from ingot import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts(demo_engine_fp32):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_engine_fp32 / "tokenizer.json"))
    ids = tokenizer.encode((ROOT / "runtime/scheduler.py").read_text()).ids
    return [ids[97 * i : 97 * i + 11 + 13 * i] for i in range(12)]


def tokens(outputs):
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.fixture(scope="module")
def alone(demo_engine_fp32, prompts):
    """The definition: each prompt by itself, nothing cached."""
    with LLM(demo_engine_fp32, prefix_cache=False) as llm:
        return [tokens(llm.generate([p], GREEDY, progress=False))[0] for p in prompts]


def test_alone_equals_transformers(alone, prompts):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "engines/demo/pycoder-14m", dtype=torch.float32)
    for prompt, ours in zip(prompts, alone, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert out[0, len(prompt) :].tolist() == ours


def test_batched_equals_alone(demo_engine_fp32, prompts, alone):
    with LLM(demo_engine_fp32, max_num_batched_tokens=48) as llm:
        assert tokens(llm.generate(prompts, GREEDY, progress=False)) == alone


def test_warm_prefix_equals_cold(demo_engine_fp32, prompts, alone):
    with LLM(demo_engine_fp32, page_size=8) as llm:
        cold = llm.generate(prompts, GREEDY, progress=False)
        warm = llm.generate(prompts, GREEDY, progress=False)
    assert tokens(cold) == tokens(warm) == alone
    assert any(o.num_cached_tokens > 0 for o in warm), "the second round was meant to hit the prefix cache"


def test_preempted_equals_alone(demo_engine_fp32, prompts, alone):
    pages = 2 + max(len(p) + 24 for p in prompts) // 8 + 6  # the longest request fits; all together do not
    with LLM(demo_engine_fp32, page_size=8, num_kv_pages=pages, prefix_cache=False) as llm:
        assert tokens(llm.generate(prompts, GREEDY, progress=False)) == alone
        assert llm.metrics().preemptions > 0, "the pool was meant to be too small"
