"""The engine in a process of its own: replaced when it is killed, hangs or breaks, and gone when its parent is."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager

import pytest
from engine_process import LONG, PROMPT, SHORT, alive, cpu_seconds, idle, last_of, until
from ingot import LLM, SamplingParams
from ingot.engines.errors import EngineError
from ingot.engines.manifest import Manifest
from ingot.runtime.server import child
from ingot.runtime.server.channel import Failed, Frames, FromEngine, News, Ping, Pong, Ready, Submit, frame, options
from ingot.runtime.server.engine import EngineProcess


def test_defaults_that_cannot_be_are_one_sentence(demo_engine_fp32, tmp_path, capfd):
    engine = shutil.copytree(demo_engine_fp32, tmp_path / "engine")
    (engine / "generation_config.json").write_text('{"top_p": 0}')
    Manifest.read(engine).save(engine)
    with LLM(engine) as llm:
        assert llm.generate(PROMPT, SHORT, progress=False)[0].finished, "who gives parameters needs none of them"
        with pytest.raises(EngineError, match="generation_config.json of .* cannot be followed .top_p is 0"):
            llm.generate(PROMPT, progress=False)
    with pytest.raises(EngineError, match="generation_config.json of .* cannot be followed .top_p is 0"):
        asyncio.run(EngineProcess(engine).start())
    assert "Traceback" not in capfd.readouterr().err


def test_killed_and_stopped_engines_are_replaced(demo_engine_fp32):
    sampled = SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)

    async def strike(engine, blow, words, expected):
        pid, restarts = engine.pid, engine.restarts
        streaming = engine.generate(PROMPT, LONG, deltas=True)
        await anext(streaming)
        waiting = asyncio.create_task(last_of(engine, PROMPT, sampled))  # there is one row: nothing comes of it yet
        await asyncio.sleep(0.1)
        os.kill(pid, blow)
        with pytest.raises(EngineError, match=words):
            async for _ in streaming:
                pass
        assert not engine.healthy and not engine.metrics().healthy
        with pytest.raises(EngineError, match=words):
            engine.check()
        newcomer = asyncio.create_task(last_of(engine, PROMPT, sampled))  # it waits for the new process
        for answer in (await waiting, await newcomer):
            assert answer.outputs[0].token_ids == expected
        assert engine.healthy and engine.pid != pid and not alive(pid) and engine.restarts == restarts + 1
        await until(lambda: idle(engine))

    async def main():
        async with EngineProcess(demo_engine_fp32, watchdog=5.0, patience=120.0, max_num_seqs=1) as engine:
            expected = (await last_of(engine, PROMPT, sampled)).outputs[0].token_ids
            await strike(engine, signal.SIGKILL, "killed by SIGKILL; it is being restarted", expected)
            await strike(engine, signal.SIGSTOP, "did not answer for 5 s and was killed", expected)
            os.kill(engine.pid, signal.SIGTERM)  # meant for the API process, which may still drain
            assert (await last_of(engine, PROMPT, sampled)).outputs[0].token_ids == expected
            last = engine.pid
            task = asyncio.create_task(last_of(engine, PROMPT, LONG))
            await until(lambda: engine.metrics().running == 1)
            begun = time.monotonic()
            await asyncio.gather(engine.close(), engine.close())
            assert time.monotonic() - begun < 30 and not alive(last)
            assert (await task).outputs[0].finish_reason == "abort"
            with pytest.raises(EngineError, match="closed"):
                await last_of(engine, PROMPT)

    asyncio.run(main())


@asynccontextmanager
async def breakable(engine, tmp_path, monkeypatch, **options):
    """An EngineProcess whose steps do what the file `mischief` says, once: raise, or hang."""
    mischief, program, python = (tmp_path / name for name in ("mischief", "program.py", "python"))
    program.write_text(
        textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from ingot.runtime.cpu import CpuExecutor
        from ingot.runtime.server import child

        launch, mischief = CpuExecutor.launch, Path({str(mischief)!r})

        def mischievous(self, batch):
            if mischief.exists():
                what = mischief.read_text()
                mischief.unlink()
                if what == "hang":
                    time.sleep(600)
                raise ValueError("the graph broke")
            return launch(self, batch)

        CpuExecutor.launch = mischievous
        sys.exit(child.main(sys.argv[3:]))
        """)
    )
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def break_it(how):
        (tmp_path / "new").write_text(how)
        (tmp_path / "new").rename(mischief)

    async with EngineProcess(engine, patience=120.0, **options) as process:
        yield process, break_it


def test_failing_and_hanging_steps(demo_engine_fp32, tmp_path, monkeypatch):
    async def main():
        async with breakable(demo_engine_fp32, tmp_path, monkeypatch, watchdog=5.0) as (engine, break_it):
            expected = (await last_of(engine, PROMPT)).outputs[0].token_ids
            break_it("raise")  # nothing was handed out, so nobody notices but for the wait
            assert (await last_of(engine, PROMPT)).outputs[0].token_ids == expected
            assert engine.restarts == 1
            stream = engine.generate(PROMPT, LONG)
            await anext(stream)
            break_it("raise")
            with pytest.raises(EngineError, match=r"failed in a step \(ValueError: the graph broke\); it is being"):
                async for _ in stream:
                    pass
            await until(lambda: engine.healthy)
            stream = engine.generate(PROMPT, LONG)
            await anext(stream)
            break_it("hang")
            with pytest.raises(EngineError, match="committed no step for 5 s and was killed"):
                async for _ in stream:
                    pass
            assert (await last_of(engine, PROMPT)).outputs[0].token_ids == expected

    asyncio.run(main())


def test_a_request_that_breaks_the_engine_is_asked_again_only_once(demo_engine_fp32, tmp_path, monkeypatch):
    async def main():
        async with breakable(demo_engine_fp32, tmp_path, monkeypatch) as (engine, break_it):
            break_it("raise")
            task = asyncio.create_task(last_of(engine, PROMPT))
            await until(lambda: engine.restarts == 1 or not engine.healthy)
            break_it("raise")
            with pytest.raises(EngineError, match="the graph broke"):
                await task

    asyncio.run(main())


def test_an_engine_that_opens_no_more_is_given_up(demo_engine_fp32, tmp_path):
    folder = shutil.copytree(demo_engine_fp32, tmp_path / "engine")

    async def main():
        async with EngineProcess(folder, patience=0.2) as engine:
            await last_of(engine, PROMPT)
            await asyncio.sleep(0.1)
            (folder / "engine.json").unlink()
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: not engine.healthy)
            with pytest.raises(EngineError, match="is being restarted"):  # patience has an end
                await last_of(engine, PROMPT)
            await until(lambda: engine.gave_up)
            with pytest.raises(EngineError, match="did not open the engine .*3 times in a row"):
                engine.check()
            with pytest.raises(EngineError, match="3 times in a row"):
                await last_of(engine, PROMPT)
            assert not engine.healthy and not engine.metrics().healthy and engine.pid is None

    asyncio.run(main())


def test_an_engine_that_cannot_be_opened(tmp_path):
    async def main():
        with pytest.raises(EngineError) as here:
            LLM(tmp_path)
        with pytest.raises(EngineError) as there:
            async with EngineProcess(tmp_path):
                pass
        assert str(there.value) == str(here.value)
        with pytest.raises(EngineError, match="max_num_seqs is 0"):
            EngineProcess(tmp_path, max_num_seqs=0)
        with pytest.raises(EngineError, match="not been started"):
            EngineProcess(tmp_path).check()

    asyncio.run(main())


def test_a_start_that_takes_too_long_leaves_nothing_running(demo_engine_fp32):
    pids = []

    async def main():
        engine = EngineProcess(demo_engine_fp32, start_timeout=0.2)
        with pytest.raises(EngineError, match="not open after 0.2 s"):
            task = asyncio.create_task(engine.start())
            await asyncio.sleep(0)  # it has a supervisor then
            await until(lambda: engine._supervisor._starting.pid)
            pids.append(engine._supervisor._starting.pid)
            await task

    asyncio.run(main())
    assert not alive(pids[0])


def test_the_engine_process_ends_with_its_parent(demo_engine_fp32):
    program = textwrap.dedent(f"""
        import asyncio
        from ingot import SamplingParams
        from ingot.runtime.server.engine import EngineProcess

        async def main():
            async with EngineProcess({str(demo_engine_fp32)!r}) as engine:
                async for _ in engine.generate([5, 6], SamplingParams(max_tokens=10000, ignore_eos=True)):
                    print(engine.pid, flush=True)

        asyncio.run(main())
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 30
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)


def test_a_slow_reader_gets_few_messages_and_garbage_ends_the_process(demo_engine_fp32):
    ours, theirs = socket.socketpair()
    ours.settimeout(300)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    setting = json.dumps({"engine": str(demo_engine_fp32), "options": {}})
    command = [sys.executable, "-m", child.__name__, str(theirs.fileno()), setting]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    frames = Frames(FromEngine)

    def heard():
        while data := ours.recv(1 << 16):
            yield from frames.feed(data)

    messages = heard()
    assert isinstance(next(messages), Ready)
    params = options(SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, logprobs=5))
    for number in range(4):
        ours.sendall(frame(Submit(number, [5, 6, 7], params, 0, time.monotonic())))
    busy = 0.0
    while busy != (busy := cpu_seconds(process.pid)):  # they run to their end while nobody reads
        time.sleep(1.5)
    tokens, news = {number: 0 for number in range(4)}, 0
    ended = 0
    while ended < 4:
        message = next(messages)
        if isinstance(message, News):
            news += 1
            for update in message.updates:
                for part in update.parts:
                    tokens[update.number] += len(part.token_ids)
                    assert len(part.logprobs) == len(part.token_ids)
                    ended += part.finish_reason is not None
    assert set(tokens.values()) == {400} and news < 100
    ours.sendall(frame(Ping()))
    while not isinstance(message := next(messages), Pong):
        pass
    assert message.steps >= 400 and not message.working
    ours.sendall(b"\xff\xff\xff\xffnonsense")
    while not isinstance(message := next(messages), Failed):
        pass
    assert "could not read the channel" in message.why
    assert process.wait(60) == child.BROKEN
    ours.close()
