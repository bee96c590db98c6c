"""Several API processes before one engine: one server to whoever calls it, whatever becomes of its processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

COMPLETION = {"prompt": "def main():\n", "temperature": 0, "ignore_eos": True}
# each request on a connection of its own, so that it may come to either worker
CLIENT = httpx2.Client(timeout=120, limits=httpx2.Limits(max_keepalive_connections=0))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel spreads connections on Linux only")
pytestmark = LINUX


class Server:
    """A server with two workers that is ready."""

    def __init__(self, engine, log, *options):
        command = [sys.executable, "-m", "ingot", "serve", str(engine), "--port", "0", "--api-workers", "2",
                   "--log-level", "info", *options]  # fmt: skip
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("ingot serves draft at http://") and "2 API workers" in line, line + log.read_text()
        self.url = line.split(" at ")[1].split(": ")[0]

    def post(self, max_tokens=3, **more):
        return CLIENT.post(f"{self.url}/v1/completions", json=COMPLETION | {"max_tokens": max_tokens} | more)

    def metric(self, name):
        page = CLIENT.get(f"{self.url}/metrics").text
        return float(next(line.split()[-1] for line in page.splitlines() if line.startswith(f"ingot:{name}{{")))

    def children(self, module):
        """Pids of our processes of that kind."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"server.{module}" in (path / "cmdline").read_text():
                    found.append(int(path.name))
            except OSError:
                pass
        return found

    def until(self, what, seconds=120):
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stream(self, max_tokens):
        return Stream(self, max_tokens)


class Stream(threading.Thread):
    """A streamed completion, read in a thread until it ends or we `leave`; `lines` are its events' data."""

    def __init__(self, server, max_tokens):
        super().__init__()
        self.server, self.max_tokens, self.lines, self.left = server, max_tokens, [], False
        self.start()
        server.until(lambda: self.lines)

    def run(self):
        body = COMPLETION | {"max_tokens": self.max_tokens, "stream": True}
        try:
            with CLIENT.stream("POST", f"{self.server.url}/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if self.left:
                        return
                    if line.startswith("data: "):
                        self.lines.append(line[6:])
        except httpx2.HTTPError as error:
            self.lines.append(repr(error))

    def leave(self):
        self.left = True


@contextmanager
def serving(engine, log, *options):
    server = Server(engine, log, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with serving(engine, tmp_path_factory.mktemp("workers") / "log", "--max-num-seqs", "4", "--max-waiting", "2",
                 "--stream-pause", "0") as server:  # fmt: skip
        yield server


def test_both_workers_answer_and_either_tells_of_all(server):
    before = {name: server.metric(name) for name in ("generation_tokens_total", "request_generation_tokens_count")}
    for _ in range(24):
        assert server.post().json()["usage"]["completion_tokens"] == 3
    log = server.log.read_text()
    assert all(f"worker {i} ingot.request" in log for i in (0, 1)), log

    def more(name):  # of each of eight answers, whichever worker is asked
        return {server.metric(name) - before[name] for _ in range(8)}

    server.until(lambda: more("generation_tokens_total") == {72} and more("request_generation_tokens_count") == {24})


def test_limits_hold_for_all_together(server):
    streams = [server.stream(3900) for _ in range(4)]  # these run; two more may wait
    waiting = [threading.Thread(target=server.post) for _ in range(2)]
    for thread in waiting:
        thread.start()
    server.until(lambda: server.metric("num_requests_waiting") == 2)
    for _ in range(8):
        refused = server.post()
        assert refused.status_code == 429 and "6 sequences are open, the limit is 6" in refused.text
    for stream in streams:
        stream.leave()
    for thread in (*streams, *waiting):
        thread.join(120)
    server.until(lambda: server.metric("num_requests_running") == 0)
    assert server.post().status_code == 200


def test_a_worker_that_dies_is_replaced_and_what_it_had_is_free(server):
    victim, *_ = sorted(server.children("worker"))
    streams = [server.stream(3900) for _ in range(4)]
    (engine,) = server.children("child")
    os.kill(victim, signal.SIGKILL)
    for other in server.children("worker"):
        if other != victim:
            os.kill(other, signal.SIGKILL)  # all streams are lost, whoever had them
    for stream in streams:
        stream.join(120)
        assert stream.lines[-1] != "[DONE]"
    server.until(lambda: len(server.children("worker")) == 2 and victim not in server.children("worker"))
    server.until(lambda: server.metric("num_requests_running") == 0)
    assert server.children("child") == [engine]
    for _ in range(6):
        assert server.post().status_code == 200
    wide = server.post(n=6)  # as many as there is room for when nothing is open
    assert wide.status_code == 200 and len(wide.json()["choices"]) == 6


def test_an_engine_that_dies_is_replaced_under_the_same_workers(server):
    workers, (engine,) = server.children("worker"), server.children("child")
    stream = server.stream(3900)
    os.kill(engine, signal.SIGKILL)
    stream.join(120)
    assert "The engine process" in json.loads(stream.lines[-1])["error"]["message"]
    for _ in range(6):
        assert server.post().status_code == 200  # waits for the next one
    assert sorted(server.children("worker")) == sorted(workers) and engine not in server.children("child")
    server.until(lambda: {CLIENT.get(f"{server.url}/ready").status_code for _ in range(6)} == {200})


def test_another_server_does_not_take_the_port(server, engine):
    port = server.url.rpartition(":")[2]
    for more in ([], ["--api-workers", "2"]):
        done = subprocess.run([sys.executable, "-m", "ingot", "serve", str(engine), "--port", port, *more],
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 3 and "cannot be served on" in done.stderr and done.stderr.count("\n") == 1


def test_a_signal_drains_all(engine, tmp_path):
    with serving(engine, tmp_path / "log", "--drain-timeout", "120") as server:
        pids = server.children("worker") + server.children("child")
        assert len(pids) == 3
        streams = [server.stream(400) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join(120)
            assert stream.lines[-1] == "[DONE]"
        assert server.process.wait(120) == 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_second_signal_aborts(engine, tmp_path):
    with serving(engine, tmp_path / "log", "--drain-timeout", "600") as server:
        streams = [server.stream(4000) for _ in range(3)]
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: server.log.read_text().count("ending in order") == 3)  # the parent and both workers
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
        for stream in streams:
            stream.join(60)
            assert "error" in json.loads(stream.lines[-1]), stream.lines[-1]


def test_what_cannot_be_is_one_sentence(engine, tmp_path):
    for arguments, code, words in (
        ((engine, "--api-workers", 2, "--replicas", 2), 2, "cannot be combined"),
        ((engine, "--api-workers", 0), 2, "--api-workers"),
        ((tmp_path / "none", "--api-workers", 2, "--port", 0), 3, "does not exist"),
        ((engine, "--api-workers", 2, "--port", 0, "--stream-pause", -1), 3, "stream_pause is -1"),
    ):
        done = subprocess.run([sys.executable, "-m", "ingot", "serve", *map(str, arguments)], capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr, done
