"""What scheduling must not change: cold against warm prefix, batched against alone, preempted against not.

fp32, greedy, pycoder-14m over the project's own documents (which the model has never seen); on the cpu target, and on
TensorRT where it runs.
"""

from pathlib import Path

import pytest
import torch
from ingot import LLM, BuildConfig, SamplingParams, build_engine

ROOT = Path(__file__).parents[1]
SIZES = dict(max_num_seqs=16, max_num_batched_tokens=256, page_size=8)  # the most that a test asks for
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", params=["cpu", pytest.param("tensorrt", marks=pytest.mark.tensorrt)])
def engine(request, tmp_path_factory):
    if request.param == "cpu":
        return request.getfixturevalue("demo_engine_fp32")
    folder = tmp_path_factory.mktemp("tensorrt") / "engine"
    model = str(ROOT / "engines/demo/pycoder-14m")
    build_engine(BuildConfig(model, str(folder), request.param, dtype="float32", **SIZES))
    return folder


@pytest.fixture(scope="module")
def prompts(engine):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))
    ids = tokenizer.encode((ROOT / "runtime/scheduler.py").read_text()).ids
    return [ids[97 * i : 97 * i + 11 + 13 * i] for i in range(12)]


def tokens(outputs):
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.fixture(scope="module")
def alone(engine, prompts):
    """The definition: each prompt by itself, nothing cached."""
    with LLM(engine, prefix_cache=False) as llm:
        return [tokens(llm.generate([p], GREEDY, progress=False))[0] for p in prompts]


def test_alone_equals_transformers(alone, prompts):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "engines/demo/pycoder-14m", dtype=torch.float32)
    for prompt, ours in zip(prompts, alone, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert out[0, len(prompt) :].tolist() == ours


def test_batched_equals_alone(engine, prompts, alone):
    with LLM(engine, max_num_batched_tokens=48) as llm:
        assert tokens(llm.generate(prompts, GREEDY, progress=False)) == alone


def test_warm_prefix_equals_cold(engine, prompts, alone):
    with LLM(engine, page_size=8) as llm:
        cold = llm.generate(prompts, GREEDY, progress=False)
        warm = llm.generate(prompts, GREEDY, progress=False)
    assert tokens(cold) == tokens(warm) == alone
    assert any(o.num_cached_tokens > 0 for o in warm), "the second round was meant to hit the prefix cache"


def test_preempted_equals_alone(engine, prompts, alone):
    pages = 2 + max(len(p) + 24 for p in prompts) // 8 + 6  # the longest request fits; all together do not
    with LLM(engine, page_size=8, num_kv_pages=pages, prefix_cache=False) as llm:
        assert tokens(llm.generate(prompts, GREEDY, progress=False)) == alone
        assert llm.metrics().preemptions > 0, "the pool was meant to be too small"
