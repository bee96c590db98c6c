"""Two real replicas of the demo engine behind the router: load while one is killed, an orderly end, a router killed."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import pytest
from engine_process import wait_for
from ingot.engines.errors import EngineError
from ingot.runtime.server.config import ServerConfig
from ingot.runtime.server.router import replicas as replicas_module
from ingot.runtime.server.router.backends import Backend
from ingot.runtime.server.router.main import serve_replicas
from ingot.runtime.server.router.replica import Setting
from ingot.runtime.server.router.replicas import Gpu, Replica, Replicas, devices_of

START = """
import asyncio, logging, sys
from pathlib import Path
from ingot.runtime.server.config import ServerConfig
from ingot.runtime.server.router.main import serve_replicas
logging.basicConfig(level=logging.INFO)
config = ServerConfig(engine=Path(sys.argv[1]), port=0, served_model_name="m", api_keys=("key",))
asyncio.run(serve_replicas(config, {"max_num_seqs": 8, "max_model_len": 2048, "kv_cache_memory": 1 << 24}, 2))
"""
PROMPTS = ["def add(a, b):", "import os", "class A:", "for i in range(10):", "x = [", "if __name__"]


class Router:
    """The process, its address and the processes of its replicas, as its log tells them."""

    def __init__(self, engine):
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(engine)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # two engines on the cores of a test machine
        )  # fmt: skip
        self.log, self.pids = [], {}
        threading.Thread(target=self._read, daemon=True).start()
        line = self.process.stdout.readline()
        assert line, "".join(self.log)
        assert line.startswith("ingot serves m at") and "2 replicas" in line
        self.address = re.search(r"http://\S+", line)[0]

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"(replica \d) is process (\d+)", line):
                self.pids[found[1]] = int(found[2])


@contextmanager
def running(engine):
    router = Router(engine)
    try:
        yield router
    finally:
        if router.process.poll() is None:
            router.process.kill()
        router.process.wait()


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def _load(router, num_clients, seconds):
    """Clients that ask again and again, some of them for streams; a replica is killed in the middle of it."""
    ends = time.monotonic() + seconds
    answers, streams = [], []

    async def whole(client, number):
        while time.monotonic() < ends or len(answers) <= 12:
            prompt = PROMPTS[(number + len(answers)) % len(PROMPTS)]
            body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            response = await client.post("/v1/completions", json=body)
            text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
            answers.append((response.status_code, prompt, text))

    async def stream(client):
        while time.monotonic() < ends:
            body = {"model": "m", "prompt": "def f(", "max_tokens": 24, "stream": True, "ignore_eos": True}
            response = await client.post("/v1/completions", json=body)
            streams.append((response.status_code, response.text))

    async def kill():
        await asyncio.sleep(seconds / 3)
        os.kill(router.pids["replica 0"], signal.SIGKILL)

    headers = {"Authorization": "Bearer key"}
    async with httpx2.AsyncClient(base_url=router.address, headers=headers, timeout=120) as client:
        await asyncio.gather(kill(), *(whole(client, i) for i in range(num_clients)), *(stream(client) for _ in "123"))
    return answers, streams


def test_a_replica_is_killed_under_load_and_comes_back(demo_engine):
    with running(demo_engine) as router, httpx2.Client(base_url=router.address, timeout=30) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/ready").json()["ready"] == 2
        first = dict(router.pids)
        answers, streams = asyncio.run(asyncio.wait_for(_load(router, 6, 4.0), 300))
        assert {status for status, _, _ in answers} == {200}, [a for a in answers if a[0] != 200] + router.log
        texts = {}
        for _, prompt, text in answers:  # whichever replica answered
            texts.setdefault(prompt, set()).add(text)
        assert all(len(found) == 1 for found in texts.values()), texts
        assert {status for status, _ in streams} == {200}, [s for s in streams if s[0] != 200] + router.log
        for _, text in streams:  # whole, or an error at the end
            assert text.endswith("data: [DONE]\n\n") or '"server_error"' in text.split("\n\n")[-2]
        wait_for(lambda: router.pids["replica 0"] != first["replica 0"] and client.get("/ready").json()["ready"] == 2)
        assert router.pids["replica 1"] == first["replica 1"]
        page = client.get("/metrics").text
        assert page.count("ingot:router_backend_ready{") == 2 and "router_open_requests{" in page
        tokens = re.compile(r'ingot:generation_tokens_total{.*replica="(.*)"}')  # of a replica that answers in time
        wait_for(lambda: len(set(tokens.findall(client.get("/metrics").text))) == 2)
        # an orderly end: the open stream is finished, then the replicas stop
        body = {"model": "m", "prompt": "def f(", "max_tokens": 60, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body, headers={"Authorization": "Bearer key"}) as response:
            lines = response.iter_lines()
            next(lines)
            router.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""], rest[-4:] + router.log
        assert router.process.wait(120) == 0, "".join(router.log)
        assert not any(lives(pid) for pid in router.pids.values())


def test_a_second_signal_ends_everything_at_once(demo_engine):
    with running(demo_engine) as router, httpx2.Client(base_url=router.address, timeout=30) as client:
        body = {"model": "m", "prompt": "def f(", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body, headers={"Authorization": "Bearer key"}) as response:
            lines = response.iter_lines()
            next(lines)
            router.process.send_signal(signal.SIGTERM)
            router.process.send_signal(signal.SIGINT)
            assert any('"server_error"' in line for line in list(lines)[-3:])
        assert router.process.wait(120) == 0, "".join(router.log)
        assert not any(lives(pid) for pid in router.pids.values())


def test_no_replica_outlives_a_router_that_is_killed(demo_engine):
    with running(demo_engine) as router:
        router.process.kill()
        wait_for(lambda: not any(lives(pid) for pid in router.pids.values()))


def test_an_engine_that_cannot_be_opened_is_said_at_once(tmp_path, capfd, demo_engine):
    def refused(engine, message, **options):
        with pytest.raises(EngineError, match=message):
            config = ServerConfig(engine=engine, port=0)
            asyncio.run(asyncio.wait_for(serve_replicas(config, options, 2), 120))
        return capfd.readouterr().err

    assert refused(tmp_path, "is not an engine .it has no engine.json") == ""
    assert refused(demo_engine, "none does not exist", draft_engine=str(tmp_path / "none")) == ""
    shutil.copy(demo_engine / "engine.json", tmp_path)
    words = refused(tmp_path, "Replica . ended with exit code 3 before it served")
    assert "error: replica" in words and "is missing" in words


def test_a_replica_that_hangs_is_replaced(tmp_path, monkeypatch):
    async def start(self):
        self.process = await asyncio.create_subprocess_exec("sleep", "120")
        self.num_starts += 1

    async def check():
        monkeypatch.setattr(Replica, "_start", start)
        monkeypatch.setattr(replicas_module, "FIRST_DELAY", 0.01)
        replica = Replica(0, ServerConfig(engine=tmp_path), {}, Gpu(None), {})
        backend = Backend("http://a", silent=True)
        running = asyncio.ensure_future(replica.run(backend))
        while replica.num_starts < 1:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert replica.num_starts == 1 and not running.done()  # it may still be opening the engine
        backend.ready = True
        while replica.num_starts < 2:  # dead, so not ready; started again, and left alone
            await asyncio.sleep(0.01)
        assert not backend.ready
        await asyncio.sleep(0.3)
        assert replica.num_starts == 2
        running.cancel()
        replica.signal(signal.SIGKILL)
        await replica.ended()

    asyncio.run(asyncio.wait_for(check(), 60))


def test_each_replica_gets_a_gpu_and_a_port(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas_module, "_COUNT_DEVICES", "print(3)")
    assert asyncio.run(devices_of({})) == ["0", "1", "2"]
    assert asyncio.run(devices_of({"CUDA_VISIBLE_DEVICES": "2, GPU-a"})) == ["2", "GPU-a"]
    monkeypatch.setattr(replicas_module, "_COUNT_DEVICES", "import no_driver")
    assert asyncio.run(devices_of({})) == []
    config = ServerConfig(engine=tmp_path, api_keys=("a",))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    each = Replicas(3, config, {"max_num_seqs": 2}, ["4", "7"]).each
    assert [one._environment["OMP_NUM_THREADS"] for one in each] == ["2", "2", "2"]
    assert "OMP_NUM_THREADS" not in Replicas(1, config, {}, []).each[0]._environment
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert Replicas(2, config, {}, []).each[0]._environment["OMP_NUM_THREADS"] == "7"
    assert [one._environment["CUDA_VISIBLE_DEVICES"] for one in each] == ["4", "7", "4"]
    assert [one.gpu.share for one in each] == [0.45, None, 0.45] and each[0].gpu is each[2].gpu
    assert len({one.url for one in each}) == 3
    for devices in ([], ["0"]):  # nothing to share out
        assert Replicas(1, config, {}, devices).each[0]._environment.get("CUDA_VISIBLE_DEVICES") == os.environ.get(
            "CUDA_VISIBLE_DEVICES"
        )
    setting = Setting.decode(each[1]._setting.encode())
    assert setting.config.engine == tmp_path and setting.config.api_keys == ("a",)
    assert setting.options == {"max_num_seqs": 2} and setting.config.port == int(each[1].url.rpartition(":")[2])
    with pytest.raises(EngineError, match="at least 1"):
        Replicas(0, config, {}, [])


@pytest.mark.parametrize(
    ("num_replicas", "devices", "asked", "shares"),
    [
        (2, [], None, [None, None]),
        (2, [], 0.9, [None, None]),
        (1, ["0"], None, [None]),
        (2, ["0", "1", "2"], None, [None, None]),
        (2, ["0", "1"], 0.9, [None, None]),
        (3, ["0"], None, [0.3, 0.3, 0.3]),
        (3, ["0"], 0.33, [0.33, 0.33, 0.33]),
        (2, ["0"], 0.6, "is 0.6 for each replica, and 2 of them share a GPU; ask for at most 0.5, or leave it out"),
        (3, ["0", "1"], 0.9, "2 of them share a GPU"),
    ],
)
def test_replicas_share_the_memory_of_a_gpu(tmp_path, num_replicas, devices, asked, shares):
    options = {} if asked is None else {"gpu_memory_utilization": asked}
    if isinstance(shares, str):
        with pytest.raises(EngineError, match=shares):
            Replicas(num_replicas, ServerConfig(engine=tmp_path), options, devices)
        return
    each = Replicas(num_replicas, ServerConfig(engine=tmp_path), options, devices).each
    assert [one.gpu.share and round(one.gpu.share, 6) for one in each] == shares


def test_on_one_gpu_they_open_one_after_another(tmp_path, monkeypatch):
    """An engine counts all that is in use against its share: the first gets one, the second both, and so on."""
    told = []

    async def start(self):
        told.append((self.name, round(self.gpu.options()["gpu_memory_utilization"], 6)))
        self.process = await asyncio.create_subprocess_exec("sleep", "120")

    async def check():
        monkeypatch.setattr(Replica, "_start", start)
        monkeypatch.setattr(replicas_module, "FIRST_DELAY", 0.01)
        replicas = Replicas(3, ServerConfig(engine=tmp_path), {}, ["0"])
        backends = [Backend(f"http://{i}") for i in range(3)]
        running = asyncio.ensure_future(replicas.run(backends))
        for i, backend in enumerate(backends):
            while len(told) <= i:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert len(told) == i + 1, "the next one waits until this one is ready"
            backend.ready = True
        while len(replicas.each[0].gpu.holders) < 3:
            await asyncio.sleep(0.01)
        replicas.each[1].signal(signal.SIGKILL)
        while len(told) < 4:
            await asyncio.sleep(0.01)
        running.cancel()
        replicas.signal(signal.SIGKILL)
        await replicas.ended()

    asyncio.run(asyncio.wait_for(check(), 60))
    assert told == [("replica 0", 0.3), ("replica 1", 0.6), ("replica 2", 0.9), ("replica 1", 0.9)]
