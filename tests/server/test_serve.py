"""`ingot serve` as an operator meets it: a process that says when it is ready, drains, aborts, and refuses in words."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from api_server import process_serving
from engine_process import wait_for

COMPLETION = {"prompt": "def main():\n", "temperature": 0, "ignore_eos": True}


def stream(url, found, max_tokens):
    """Reads a streamed completion into `found`."""
    with httpx2.stream("POST", f"{url}/v1/completions", timeout=60,
                       json=COMPLETION | {"max_tokens": max_tokens, "stream": True}) as response:  # fmt: skip
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(line[6:])


def children(pid):
    return [int(n) for n in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_it_serves_and_lets_open_requests_end(engine):
    with process_serving(engine, "--drain-timeout", "300") as (process, url):
        answer = httpx2.post(f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 5}, timeout=120).json()
        assert answer["usage"]["completion_tokens"] == 5 and answer["model"] == "draft"
        assert httpx2.get(f"{url}/ready").status_code == 200
        told = {'ingot:generation_tokens_total{model_name="draft"} 5.0',
                'ingot:time_to_first_token_seconds_count{model_name="draft"} 1.0'}  # fmt: skip
        wait_for(lambda: told <= set(httpx2.get(f"{url}/metrics").text.splitlines()))
        assert "<title>" in httpx2.get(f"{url}/").text
        (child,) = children(process.pid)
        found = []
        reader = threading.Thread(target=stream, args=(url, found, 3000))
        reader.start()
        wait_for(lambda: len(found) >= 3)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx2.get(f"{url}/ready").status_code == 503)
        refused = httpx2.post(f"{url}/v1/completions", json=COMPLETION | {"max_tokens": 5})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        reader.join(300)
        assert found[-1] == "[DONE]" and sum('"text"' in line for line in found) > 3
        assert process.wait(120) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_second_signal_aborts(engine):
    with process_serving(engine) as (process, url):
        found = []
        reader = threading.Thread(target=stream, args=(url, found, 4000))
        reader.start()
        wait_for(lambda: len(found) >= 3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        reader.join(60)
        assert "error" in json.loads(found[-1]), found[-1]


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "ingot", "serve", *map(str, arguments)], capture_output=True,
                          text=True, timeout=300)  # fmt: skip


def test_what_cannot_be_served_is_one_sentence(engine, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, code, words in (
            ((engine, "--port", port), 3, f"127.0.0.1:{port} cannot be served on"),
            ((tmp_path / "none", "--port", 0), 3, "does not exist"),
            ((engine, "--port", 70000), 3, "port is 70000"),
            ((engine, "--port", 0, "--max-model-len", 10**6), 3, "max_model_len"),
            ((engine, "--port", 0, "--queue-timeout", 0), 3, "queue_timeout is 0"),
            ((engine, "--port", 0, "--host", "a" * 64), 3, f"{'a' * 64}:0 cannot be served on"),
            ((engine, "--port", 0, "--no-such"), 2, "No such option"),
            ((engine, "--port", 0, "--kv-cache-memory", "nan"), 2, "--kv-cache-memory is nan GiB; it must be above 0"),
            ((engine, "--port", 0, "--kv-cache-memory", 1e300), 2, "--kv-cache-memory is 1e+300 GiB; it must be"),
            ((engine, "--port", 0, "--max-num-batched-tokens", 10**9), 3, "an integer of at most 16777216"),
            ((engine, "--port", 0, "--replicas", 2, "--speculate", "x"), 3, "error: speculate is 'x'; it must be one"),
        ):
            done = run(*arguments)
            assert done.returncode == code and words in done.stderr, done
            assert done.stdout == "" and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_log_has_a_line_for_each_event_and_request(engine):
    with process_serving(engine, "--log-format", "json", "--log-level", "info") as (process, url):
        headers = {"X-Request-Id": "one"}
        body = COMPLETION | {"max_tokens": 5}
        assert httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120).status_code == 200
        httpx2.get(f"{url}/health")
        (child,) = children(process.pid)
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: children(process.pid) not in ([], [child]) and httpx2.get(f"{url}/ready").status_code == 200)
        assert httpx2.post(f"{url}/v1/completions", json=body, timeout=120).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    requests = [line for line in lines if "completions" in str(line)]
    assert [line["event"] for line in requests] == ["request"] * 2, requests  # and uvicorn does not say them again
    assert requests[0]["request_id"] == "one" and requests[0]["output_tokens"] == 5
    told = [line["event"] for line in lines if "event" in line]
    assert told == ["engine_started", "request", "engine_lost", "engine_restarted", "request", "stopping", "draining",
                    "drained"]  # fmt: skip
    assert next(line["pid"] for line in lines if line.get("event") == "engine_started") == child
