"""The router as a process: its command, its socket, and what its signals do to open streams."""

import asyncio
import re
import signal
import socket
import sys

import httpx2
import pytest
from ingot.engines.errors import EngineError
from ingot.runtime.server.router.main import _listen
from stub_backend import EVENT_STREAM, Stub, asynchronous, chunk, say

COMMAND = "import typer; from ingot.runtime.server.router.cli import route; typer.run(route)"


@pytest.mark.parametrize("num_signals", [1, 2])
@asynchronous
async def test_the_command_routes_and_drains(num_signals):
    finish = asyncio.Event()

    async def script(stub, asked, writer):
        await say(writer, EVENT_STREAM.encode(), chunk(b"data: 1\n\n"))
        await finish.wait()
        await say(writer, chunk(b"data: [DONE]\n\n"), chunk(b""))

    stub = await Stub(script).start()
    unused = socket.socket()  # bound, so that nobody takes its port, and not listening
    unused.bind(("127.0.0.1", 0))
    nobody = f"127.0.0.1:{unused.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", COMMAND, f"127.0.0.1:{stub.port}", nobody, "--port", "0", "--no-follow-load",
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    line = (await process.stdout.readline()).decode()
    assert line.endswith(": 1 of 2 servers ready\n"), line
    async with httpx2.AsyncClient(base_url=re.search(r"http://[\d.:]+\d", line)[0], timeout=20) as client:
        async with client.stream("POST", "/v1/completions", json={"prompt": "hello", "stream": True}) as response:
            pieces = response.aiter_text()
            got = await anext(pieces)
            process.send_signal(signal.SIGTERM)
            while (await client.get("/ready")).status_code != 503:
                await asyncio.sleep(0.01)
            if num_signals == 1:
                finish.set()
            else:
                process.send_signal(signal.SIGTERM)
            got += "".join([piece async for piece in pieces])
    assert got.split("\n\n")[0] == "data: 1"
    assert got.endswith("data: [DONE]\n\n") if num_signals == 1 else '"server_error"' in got
    assert await asyncio.wait_for(process.wait(), 60) == 0
    await stub.stop()
    unused.close()


def test_small_packets_are_not_held_back():
    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]) as _:
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(EngineError, match="choose another --port"):
            _listen("127.0.0.1", listener.getsockname()[1])
