"""Engines for the cuda target: built and refused anywhere, run where there is a GPU."""

from pathlib import Path

import ingot
import pytest
import torch
from ingot import LLM, SamplingParams, build_engine
from ingot.builder import BuildConfig
from ingot.builder.retarget import retarget
from ingot.engines.errors import BuildError, EngineError
from ingot.engines.manifest import Manifest
from ingot.engines.plan import FOLDER, Plan

pytest.importorskip("triton")

DEMO = Path(ingot.__file__).parent / "engines/demo"
SIZES = dict(target="cuda", max_num_seqs=8, max_num_batched_tokens=64, max_draft_tokens=0)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
PROMPTS = ["def add(a, b):\n", "import os\n\n\nclass Path", "for i in range(10):\n    ", "# A comment\n" * 30, "x"] * 3
GPU = torch.cuda.is_available()


def build(out, model="pycoder-draft-2m", **options):
    config = BuildConfig(str(DEMO / model), str(out), **options)
    return build_engine(config), out


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda") / "engine", dtype="float32", tune=False, **SIZES)[1]


@pytest.fixture(scope="module", params=[
    pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("tensorrt", marks=pytest.mark.tensorrt),
])  # fmt: skip
def engine_on_gpu(request, tmp_path_factory):
    if request.param == "cuda":
        return request.getfixturevalue("engine")
    return build(tmp_path_factory.mktemp("tensorrt") / "engine", dtype="float32", **SIZES | dict(target="tensorrt"))[1]


@pytest.fixture(scope="module")
def cpu_engine(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cpu") / "engine", dtype="float32")[1]


def test_an_engine_holds_plan_and_cubins(engine):
    manifest, plan = Manifest.open(engine), Plan.open(engine / FOLDER)
    assert manifest.target == "cuda" and "not timed" in manifest.target_info["tactics"]
    assert (plan.max_num_seqs, plan.max_num_batched_tokens, plan.page_size) == (8, 64, 16)
    assert all((engine / FOLDER / cubin.file).read_bytes()[:4] == b"\x7fELF" for cubin in plan.cubins)
    used = {launch.cubin for bucket in plan.buckets for part in bucket.parts.values() for launch in part}
    assert used == set(range(len(plan.cubins)))
    assert max(bucket.arena for bucket in plan.buckets) < 8 << 20


def test_retargeting_keeps_the_weights_and_makes_the_plan_anew(cpu_engine, tmp_path):
    folder = tmp_path / "engine"
    build(folder, dtype="float32")
    weights = (folder / "weights.safetensors").read_bytes()
    few = dict(target="cuda", max_num_seqs=1, max_num_batched_tokens=16)  # half as many cubins
    manifest = retarget(folder, BuildConfig("", str(folder), gpu_arch=80, tune=False, **few))
    assert manifest.target == "cuda" and manifest.target_info["capability"] == 80
    assert Plan.open(folder / FOLDER).capability == 80
    assert (folder / "weights.safetensors").read_bytes() == weights
    assert Manifest.open(folder).model == manifest.model and not (folder / "cpu").exists()


def test_an_architecture_that_is_none(tmp_path):
    with pytest.raises(BuildError, match="75, expected one of 80, 86"):
        build(tmp_path / "engine", gpu_arch=75, **SIZES)
    assert not (tmp_path / "engine").exists()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence(engine):
    with pytest.raises(EngineError, match="NVIDIA driver|cuda-python"):
        LLM(engine)


def test_greedy_tokens_are_the_cpu_engines(engine_on_gpu, cpu_engine):
    with LLM(cpu_engine) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, progress=False)]
    with LLM(engine_on_gpu) as llm:
        for _ in range(2):  # cold, and with every prefix cached
            found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, progress=False)]
            assert found == wanted
        alone = [llm.generate(prompt, GREEDY, progress=False)[0].outputs[0].token_ids for prompt in PROMPTS[:5]]
    assert alone == wanted[:5]


@pytest.mark.gpu
def test_bf16_with_timed_tactics(tmp_path, cpu_engine):
    manifest, folder = build(tmp_path / "engine", dtype="bfloat16", **SIZES)
    assert manifest.target_info["tactics"].startswith("timed on")
    with LLM(cpu_engine) as llm:
        wanted = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:5], GREEDY, progress=False)]
    with LLM(folder) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[:5], GREEDY, progress=False)]
    same = sum(a == b for one, two in zip(found, wanted, strict=True) for a, b in zip(one, two, strict=True))
    assert same > 0.5 * sum(map(len, wanted)), "rounding changes a token here and there, and what follows it"


def test_every_way_to_sample(engine_on_gpu, cpu_engine):
    params = [
        GREEDY,
        SamplingParams(max_tokens=12, temperature=0.8, seed=1),
        SamplingParams(max_tokens=12, temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=2),
        SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.3, logit_bias={40: -100.0}, logprobs=3),
        SamplingParams(max_tokens=12, temperature=0.0, logprobs=5, prompt_logprobs=2),
    ]
    with LLM(engine_on_gpu) as llm:
        first = llm.generate(PROMPTS[:5], params, progress=False)
        again = [llm.generate(*one, progress=False)[0] for one in zip(PROMPTS[:5], params, strict=True)]
    with LLM(cpu_engine) as llm:
        cpu = llm.generate(PROMPTS[:5], params, progress=False)
    for i, (a, b) in enumerate(zip(first, again, strict=True)):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids, f"request {i} depends on what it was batched with"
    for i in (0, 3, 4):  # what is drawn differs: the generators do
        assert first[i].outputs[0].token_ids == cpu[i].outputs[0].token_ids
    for i in (3, 4):
        for ours, theirs in zip(first[i].outputs[0].logprobs, cpu[i].outputs[0].logprobs, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(abs(ours[t].logprob - theirs[t].logprob) < 1e-3 for t in ours)
            assert all(ours[t].rank == theirs[t].rank for t in ours)
    ours, theirs = first[4].prompt_logprobs, cpu[4].prompt_logprobs
    assert len(ours) == len(theirs)
    for one, two in zip(ours[1:], theirs[1:], strict=True):
        assert one.keys() == two.keys() and all(abs(one[t].logprob - two[t].logprob) < 1e-3 for t in one)


@pytest.mark.gpu
def test_what_the_plan_does_not_hold_is_refused(engine):
    for options, words in (
        (dict(max_num_seqs=9), "built for at most 8"),
        (dict(page_size=32), "pages of 16"),
        (dict(num_kv_pages=1), "pool would have 1 pages"),
        (dict(gpu_memory_utilization=1e-6), "free after the weights"),
    ):
        with pytest.raises(EngineError, match=words):
            LLM(engine, **options)
