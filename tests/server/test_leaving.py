"""Time and clients that leave: whatever ends a request early, the engine has nothing left to do within a step."""

import asyncio
import json
import socket
import threading
import time

import httpx2
import pytest
from api_server import Scripted, api, serving
from ingot import AsyncLLM, SamplingParams
from starlette.testclient import TestClient

LONG = {"prompt": "def f():", "max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def num_aborted(llm):
    return llm.metrics().finished.get("abort", 0)


def idle(llm, aborted, seconds=60.0):
    """Waits until the engine has nothing to do and so many requests were aborted, which is counted last."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
        m = llm.metrics()
        if m.running == m.waiting == 0 and m.kv_utilisation == 0 and m.finished.get("abort", 0) == aborted:
            return
        time.sleep(0.005)
    raise AssertionError(llm.metrics())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(llm, stream):
    app, room = api(llm, request_timeout=2.0)  # enough for the first token, not for the last
    aborted = num_aborted(llm)
    with TestClient(app) as client:
        response = client.post("/v1/completions", json={**LONG, "n": 4, "stream": stream})
        if stream:
            assert response.status_code == 200 and "[DONE]" not in response.text
            error = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))["error"]
        else:
            assert response.status_code == 504
            error = response.json()["error"]
        assert error["code"] == "request_timeout" and "2 seconds" in error["message"]
    idle(llm, aborted + 4)
    assert room.inside == 0


def test_a_request_that_waits_too_long_for_its_first_token_is_ended(engine):
    async def scenario():
        async with AsyncLLM(engine, max_num_seqs=1) as llm:
            app, room = api(llm, queue_timeout=0.2)
            before = llm.generate(LONG["prompt"], SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True))
            await anext(before)  # it has the only place
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
                second = await client.post("/v1/completions", json={"prompt": ["a", "b"], "stream": True})
            while llm.metrics().waiting:  # the cancelled ones leave the queue with the next step
                await asyncio.sleep(0.005)
            assert llm.metrics().running == 1 and room.inside == 0
            await before.aclose()
            return second

    second = asyncio.run(scenario())
    assert second.status_code == 504 and second.json()["error"]["code"] == "queue_timeout", second.text


@pytest.fixture(scope="module")
def address(llm):
    app, _ = api(llm)
    with serving(app) as url:
        yield url


@pytest.mark.parametrize("prompts", [LONG["prompt"], [LONG["prompt"]] * 3])
def test_a_client_that_leaves_a_stream_ends_the_work(llm, address, prompts):
    body = {**LONG, "prompt": prompts, "stream": True}
    aborted = num_aborted(llm)
    with httpx2.Client() as client, client.stream("POST", f"{address}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: a generator that is collected closes the connection
        next(lines)
        assert llm.metrics().running > 0
    idle(llm, aborted + (1 if isinstance(prompts, str) else len(prompts)))


def test_a_client_that_leaves_while_it_waits_ends_the_work(llm, address):
    body = json.dumps({**LONG, "n": 2}).encode()
    aborted = num_aborted(llm)
    host, port = address.removeprefix("http://").split(":")
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 120
        while llm.metrics().running < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert llm.metrics().running == 2
    idle(llm, aborted + 2)


def test_long_prompts_are_tokenised_beside_the_event_loop(llm):
    class Watched:
        threads: list = []

        def __getattr__(self, name):
            return getattr(llm.text, name)

        def encode(self, text, **options):
            if text.startswith(("a ", "<|user|>")):  # and not when tags are looked up
                self.threads.append(threading.current_thread())
            return llm.text.encode(text, **options)

    watched = Watched()
    app, _ = api(Scripted(llm, "x", text=watched))
    with TestClient(app) as client:
        for prompt in ("a short one", "a b " * 2000):
            assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 200
        assert client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": prompt}]})
    short, long, chat = watched.threads
    assert short not in (long, chat) and {"asyncio" in t.name for t in (long, chat)} == {True}
