"""`ingot serve` under load: what HTTP costs against the offline engine, and whether it keeps its promises.

    python benchmarks/serving.py ENGINE cost [--concurrency 64] [--requests 256] [--output-len 64]
    python benchmarks/serving.py ENGINE soak [--seconds 120] [--streams 256]

cost: output tokens/s of streamed completions over HTTP against `LLM.generate` on the same engine and prompts, in turns,
and the CPU time of a token in each process: where load, API and engine share processors, the floor is what these say.
soak: streams from a second process that end, are left in the middle, ask for too much or are no JSON at all; at the end
the engine must hold nothing, its memory must be flat, and every finished stream must be what the offline engine says.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ingot import LLM, SamplingParams

SOURCES = sorted((Path(__file__).resolve().parents[1] / "runtime").glob("*.py"))


@asynccontextmanager
async def server(engine: Path, *options: str):
    """(port, process) of an `ingot serve` that is ready."""
    command = [sys.executable, "-m", "ingot", "serve", str(engine), "--port", "0", "--served-model-name", "m", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    try:
        address = re.search(r"http://[\d.]+:(\d+)", line)
        assert address, f"{line!r} tells no address"
        yield int(address[1]), process
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 60)


async def send(port: int, path: str, body: bytes | None, leave_after: int | None = None) -> tuple[int, list[bytes]]:
    """(status, lines of the answer); gone after so many lines if `leave_after` is given. One connection each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        head = "POST" if body is not None else "GET"
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body is not None else ""
        writer.write(f"{head} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{length}\r\n".encode() + (body or b""))
        status = int((await reader.readline()).split()[1])
        if leave_after is None:  # in large pieces: the client shares its processors with the server
            return status, (await reader.read(-1)).splitlines(keepends=True)
        return status, [await reader.readline() for _ in range(leave_after + 1)]
    finally:
        writer.close()


def text_of(lines: list[bytes]) -> tuple[str, int, bool]:
    """(text, chunks, whether it is complete) of a streamed completion."""
    text, chunks = "", 0
    for line in lines:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            for choice in chunk.get("choices", ()):
                text += choice["text"]
                chunks += 1
    return text, chunks, b"data: [DONE]\n" in lines


def prompts(num: int, seed: int = 0) -> list[str]:
    """Pieces of this project's source."""
    rng, text = random.Random(seed), "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    starts = [rng.randrange(len(text) - 600) for _ in range(num)]
    return [text[start : start + rng.randrange(40, 600)] for start in starts]


def completion(prompt: str, max_tokens: int, **more: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
                       "ignore_eos": True, **more}).encode()  # fmt: skip


async def cost(args: argparse.Namespace) -> None:
    texts = prompts(args.requests)
    params = SamplingParams(max_tokens=args.output_len, temperature=0, ignore_eos=True)
    found: dict[str, list[float]] = {"offline": [], "http": []}
    used: dict[str, list[float]] = {"offline": [], "engine": [], "api": [], "load": []}  # us of CPU a token
    num_chunks: list[float] = []
    total = args.requests * args.output_len
    bodies = [completion(text, args.output_len) for text in texts]
    for _ in range(args.rounds):
        with LLM(args.engine, max_num_seqs=args.concurrency, prefix_cache=False) as llm:
            llm.generate(texts[:8], params, progress=False)
            start, before = time.perf_counter(), time.process_time()
            await asyncio.to_thread(llm.generate, texts, params, progress=False)
            found["offline"].append(total / (time.perf_counter() - start))
            used["offline"].append(1e6 * (time.process_time() - before) / total)
        limits = "--max-num-seqs", str(args.concurrency), "--no-prefix-cache", *args.option
        async with server(args.engine, *limits) as (port, process):
            await asyncio.gather(*(send(port, "/v1/completions", body) for body in bodies[:8]))
            gate = asyncio.Semaphore(args.concurrency)
            chunks: list[int] = []

            async def one(
                body: bytes, port: int = port, gate: asyncio.Semaphore = gate, chunks: list[int] = chunks
            ) -> None:
                async with gate:
                    status, lines = await send(port, "/v1/completions", body)
                assert status == 200 and b"data: [DONE]\n" in lines[-8:]
                chunks.append(sum(line.startswith(b"data: {") for line in lines))

            start, before, (api, engine) = time.perf_counter(), time.process_time(), seconds_of(process.pid)
            await asyncio.gather(*map(one, bodies))
            found["http"].append(total / (time.perf_counter() - start))
            used["load"].append(1e6 * (time.process_time() - before) / total)
            api_then, engine_then = seconds_of(process.pid)
            used["api"].append(1e6 * (api_then - api) / total)
            used["engine"].append(1e6 * (engine_then - engine) / total)
            num_chunks.append(total / sum(chunks))
    offline, http = (statistics.median(found[name]) for name in ("offline", "http"))
    print(
        f"concurrency {args.concurrency}, {args.requests} requests of {args.output_len} tokens: offline "
        f"{offline:.0f} tok/s, over HTTP {http:.0f} tok/s: {100 * http / offline:.1f} %  ({found})"
    )
    cpu = {name: statistics.median(values) for name, values in used.items()}
    shared = cpu["engine"] + cpu["api"] + cpu["load"]
    print(
        f"  CPU of a token, us: engine offline {cpu['offline']:.0f}; over HTTP engine {cpu['engine']:.0f}, API "
        f"{cpu['api']:.0f}, load {cpu['load']:.0f}; {statistics.median(num_chunks):.2f} tokens a chunk"
    )
    print(
        f"  engine / (engine + API) {100 * cpu['engine'] / (cpu['engine'] + cpu['api']):.1f} %; with the load on the "
        f"same processors, kept busy: {100 * cpu['offline'] / shared:.1f} %"
    )


def seconds_of(pid: int) -> tuple[float, float]:
    """CPU seconds of a server so far: its API's processes, and the engine's."""
    api = engine = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if path.name == str(pid) or int(fields[1]) == pid:
                used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                if b"ingot.runtime.server.child" in (path / "cmdline").read_bytes():
                    engine += used
                else:
                    api += used
        except OSError:  # it has ended
            pass
    return api, engine


async def soak(args: argparse.Namespace) -> None:
    texts = prompts(64, seed=1)
    lengths = [4 + 3 * i % 60 for i in range(len(texts))]
    with LLM(args.engine) as llm:
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
        expected = [output.outputs[0].text for output in llm.generate(texts, params, progress=False)]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    first_tokens: list[float] = []
    # a small KV pool: all its pages have been written to after a minute, and memory that grows is not the pool's
    small = ("--max-num-seqs", "16", "--max-model-len", "1024")
    async with server(args.engine, "--max-waiting", "128", "--queue-timeout", "30", *small) as (port, process):
        end = time.monotonic() + args.seconds

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                i, kind = rng.randrange(len(texts)), rng.random()
                begun = time.monotonic()
                if kind < 0.7:
                    status, lines = await send(port, "/v1/completions", completion(texts[i], lengths[i]))
                    text, _, complete = text_of(lines)
                    counts[f"{status} stream"] += 1
                    if status == 200 and (not complete or text != expected[i]):
                        wrong.append(f"{text[:60]!r} is not {expected[i][:60]!r}" if complete else repr(lines[-2:]))
                elif kind < 0.85:
                    status, _ = await send(port, "/v1/completions", completion(texts[i], 500), rng.randrange(9))
                    counts[f"{status} left"] += 1
                elif kind < 0.9:
                    status, _ = await send(port, "/v1/completions", b'{"prompt": "x", "max_tok')
                    counts[f"{status} malformed"] += 1
                elif kind < 0.95:
                    status, _ = await send(port, "/v1/completions", completion("x " * 20000, 5))
                    counts[f"{status} oversized"] += 1
                else:
                    status, _ = await send(port, "/v1/completions", completion(texts[i], 3))
                    first_tokens.append(time.monotonic() - begun)
                    counts[f"{status} short"] += 1
                if status == 429:
                    await asyncio.sleep(rng.random())

        memory: list[list[int]] = []

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(resident(process.pid))
                await asyncio.sleep(5)

        await asyncio.gather(watch(), *(client(number) for number in range(args.streams)))
        await asyncio.sleep(2)
        _, lines = await send(port, "/metrics", None)
        state = {name: float(line.split()[-1]) for line in lines if not line.startswith(b"#")
                 for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
                 if line.startswith(f"ingot:{name}".encode())}  # fmt: skip
    print(
        f"{args.streams} streams, {args.seconds} s: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    )
    print(f"  wrong: {len(wrong)} {wrong[:3]}; at the end {state}")
    for name, sizes in zip(("server", "engine"), zip(*memory, strict=True), strict=True):
        print(f"  resident memory of the {name}, MiB, every 5 s: {[size >> 20 for size in sizes]}")
    if first_tokens:
        first_tokens.sort()
        print(f"  short requests took {statistics.median(first_tokens):.2f} s (median), {first_tokens[-1]:.2f} at most")
    failed = wrong or any(state.values()) or any(what.startswith("5") and "503" not in what for what in counts)
    raise SystemExit(1 if failed else 0)


def resident(pid: int) -> list[int]:
    """Bytes of a process and of each of its children."""
    pids = [pid]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                pids.append(int(path.parent.name))
        except OSError:
            pass
    page = os.sysconf("SC_PAGE_SIZE")
    return [int(Path(f"/proc/{each}/statm").read_text().split()[1]) * page for each in pids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("what", choices=("cost", "soak"))
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], help="of `ingot serve`, may be given more than once")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--streams", type=int, default=256)
    args = parser.parse_args()
    asyncio.run(cost(args) if args.what == "cost" else soak(args))


if __name__ == "__main__":
    main()
