"""Engines with a KV cache in FP8: what they say, how much they hold, and that scheduling changes no token."""

from dataclasses import replace

import pytest
import torch
from hand_made import DEMO
from ingot import LLM, BuildConfig, SamplingParams, build_engine
from ingot.engines.inspect import describe
from ingot.engines.manifest import Manifest
from ingot.runtime.capacity import ServeConfig, num_kv_pages
from ingot.runtime.cpu import pools
from tokenizers import Tokenizer

DRAFT = DEMO / "pycoder-draft-2m"
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some of this project's own."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    files = sorted((DEMO.parents[1] / "runtime").glob("*.py"))
    path.write_text("\n".join(file.read_text(encoding="utf-8") for file in files)[:24_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("fp8") / "engine"
    build_engine(BuildConfig(str(DRAFT), str(folder), dtype="float32", kv_cache="fp8", calibration_data=str(text),
                             accept_accuracy=True))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def prompts(text):
    ids = Tokenizer.from_file(str(DRAFT / "tokenizer.json")).encode(text.read_text()).ids
    return [ids[97 * i : 97 * i + 11 + 13 * i] for i in range(8)]


def tokens(outputs):
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.fixture(scope="module")
def alone(engine, prompts):
    """The definition: each prompt by itself, nothing cached."""
    with LLM(engine, prefix_cache=False) as llm:
        return [tokens(llm.generate([p], GREEDY, progress=False))[0] for p in prompts]


def test_what_the_engine_says(engine):
    manifest = Manifest.open(engine)
    record = manifest.quantisation
    assert record["kv_cache"] == {"dtype": "fp8_e4m3", "per": "layer", "observer": "absmax", "centred": False}
    assert record["recipe"] == "kv-cache fp8" and record["bound"] == 0.005 and not record["rules"]
    assert 0 < record["accuracy"]["kl"] < 0.05 and len(record["accuracy"]["layers"]) == 2 * len(manifest.kv_layers)
    facts = describe(engine, manifest)
    assert {layer["dtype"] for layer in facts["kv_layers"]} == {"float8_e4m3fn"}
    assert facts["kv_bytes_per_token"] == sum(2 * each.kv_heads * each.head_dim for each in manifest.kv_layers)


def test_tokens_in_the_same_memory(engine):
    """Twice those of 16 bits; an engine whose manifest names no type has the activations'."""
    manifest = Manifest.open(engine)
    plain = replace(manifest.model, dtype="bfloat16")
    old = replace(manifest, model=plain, kv_layers=tuple(replace(each, dtype="") for each in manifest.kv_layers))
    config = ServeConfig(max_num_seqs=1, page_size=16, kv_cache_memory=8 << 20)
    assert manifest.kv_bytes_per_token * 2 == old.kv_bytes_per_token
    assert num_kv_pages(manifest, config) == 2 * num_kv_pages(old, config)
    assert {pool.dtype for pool in pools(manifest, 3, 4).values()} == {torch.float8_e4m3fn}
    assert {pool.dtype for pool in pools(old, 3, 4).values()} == {torch.bfloat16}


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
    pages = 2 + max(len(p) + 16 for p in prompts) // 8 + 6  # the longest request fits; all together do not
    with LLM(engine, page_size=8, num_kv_pages=pages, prefix_cache=False) as llm:
        assert tokens(llm.generate(prompts, GREEDY, progress=False)) == alone
        assert llm.metrics().preemptions > 0, "the pool was meant to be too small"
