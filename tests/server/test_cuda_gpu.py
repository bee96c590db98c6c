"""`ingot serve` with an engine for the cuda target: a process and its clients, as on any machine with a GPU."""

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from api_server import process_serving
from hand_made import DEMO
from ingot import LLM, BuildConfig, SamplingParams, build_engine

pytestmark = pytest.mark.gpu
PROMPTS = ["def add(a, b):\n", "import os\n\n\nclass Path", "for i in range(10):\n    ", "# A comment\n" * 30] * 3
SIZES = dict(max_num_seqs=16, max_num_batched_tokens=256, max_draft_tokens=4)
POOL = ("--gpu-memory-utilization", "0.4", "--kv-cache-memory", "0.25")  # others have some of it, too
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22]}},
          "required": ["ok", "n"], "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    out = tmp_path_factory.mktemp("engines") / "draft"
    build_engine(BuildConfig(str(DEMO / "pycoder-draft-2m"), str(out), "cuda", dtype="float32", tune=False, **SIZES))
    return out


@pytest.fixture(scope="module")
def wanted(engine):
    """What the engine answers without a server."""
    with LLM(engine, num_kv_pages=1000) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        return [output.outputs[0].text for output in llm.generate(PROMPTS, params, progress=False)]


def complete(url, prompt, **options):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 24} | options
    found = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


def streamed(url, prompt, max_tokens):
    body = {"prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(choice["text"] for line in lines[:-1] for choice in json.loads(line)["choices"])


@pytest.mark.parametrize("options", [(), ("--speculate", "ngram")], ids=["plain", "drafting"])
def test_clients_get_what_the_engine_answers(engine, wanted, options):
    with process_serving(engine, *POOL, *options) as (process, url), ThreadPoolExecutor(len(PROMPTS)) as clients:
        whole = clients.map(lambda prompt: complete(url, prompt, ignore_eos=True), PROMPTS)
        pieces = clients.map(lambda prompt: streamed(url, prompt, 24), PROMPTS)
        dates = clients.map(
            lambda seed: complete(url, PROMPTS[seed], temperature=1.0, seed=seed,
                                  structured_outputs={"regex": "[0-9]{4}-[0-9]{2}"}),
            range(8),
        )  # fmt: skip
        objects = clients.map(
            lambda seed: complete(url, PROMPTS[seed], temperature=1.2, seed=seed, max_tokens=300,
                                  structured_outputs={"json": SCHEMA}),
            range(4),
        )  # fmt: skip
        assert list(whole) == wanted and list(pieces) == wanted
        assert all(re.fullmatch("[0-9]{4}-[0-9]{2}", text) for text in dates)
        assert all(set(json.loads(text)) == {"ok", "n"} for text in objects)
        page = httpx2.get(f"{url}/metrics").text
        assert 'ingot:request_success_total{finished_reason="length",model_name="draft"} 24.0' in page, page
        assert httpx2.get(f"{url}/health").status_code == 200
        last = clients.submit(streamed, url, PROMPTS[0], 3000)
        while 'num_requests_running{model_name="draft"} 1.0' not in httpx2.get(f"{url}/metrics").text:
            assert not last.done()
        process.send_signal(signal.SIGTERM)
        assert last.result(60).startswith(wanted[0]) and process.wait(30) == 0


def test_two_replicas_share_the_gpu(engine, wanted):
    with (
        process_serving(engine, *POOL, "--replicas", "2", says="2 replicas") as (process, url),
        ThreadPoolExecutor(len(PROMPTS)) as clients,
    ):
        assert list(clients.map(lambda prompt: complete(url, prompt, ignore_eos=True), PROMPTS)) == wanted
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
