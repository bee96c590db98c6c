"""What clients of `ingot serve` see when a process behind it dies or hangs, and how long it takes to be whole again.

    python benchmarks/serving_faults.py ENGINE

For each fault: eight long streams are open and a client sends one short request after another. Then a process is killed
or stopped. Printed, in seconds from the fault on: how the streams ended and when the last of them knew; how the short
request ended that was open then, how later ones, and how long the longest of these took; when the first of the later
ones was answered; when /ready (of the router: of both servers) told of it, and when all was ready again. Every short
answer must be what the offline engine says.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ingot import LLM, SamplingParams
from serving import completion, send, server, text_of

ENGINE = "ingot.runtime.server.child"
PROMPT, WATCHDOG = "def main():", 5
FAULTS = {  # name: (signal, whom it hits, options of the server)
    "engine killed": (signal.SIGKILL, "engine", []),
    f"engine hangs (stopped; watchdog {WATCHDOG} s)": (signal.SIGSTOP, "engine", ["--watchdog", str(WATCHDOG)]),
    "one of two replicas: its engine killed": (signal.SIGKILL, "engine", ["--replicas", "2"]),
    "one of two replicas: all of it killed": (signal.SIGKILL, "replica", ["--replicas", "2"]),
}


def parent_of(pid: int) -> int:
    """0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def engines_of(pid: int) -> set[int]:
    """The engine processes below a server or router."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_engine = ENGINE in (path / "cmdline").read_text()
        except OSError:
            continue
        child = int(path.name)
        if is_engine and pid in (parent_of(child), parent_of(parent_of(child))):
            found.add(child)
    return found


@dataclass
class Clients:
    """Streams and short requests, and what became of them, by `time.monotonic()`."""

    port: int
    expected: str
    streams: list[tuple[float, str]] = field(default_factory=list)  # (end, how)
    shorts: list[tuple[float, float, str]] = field(default_factory=list)  # (begin, end, how)

    async def outcome(self, prompt: str, max_tokens: int) -> tuple[str, str]:
        """(text, how a streamed completion ended)"""
        try:
            status, lines = await send(self.port, "/v1/completions", completion(prompt, max_tokens))
        except (OSError, IndexError):
            return "", "connection broken"
        text, _, complete = text_of(lines)
        if complete:
            return text, "complete"
        if status == 200:
            told = any(line.startswith(b'data: {"error"') for line in lines[-8:])
            return text, "error event" if told else "broken off"
        return text, str(status)

    async def stream(self) -> None:
        """One that is long."""
        _, how = await self.outcome("class Stack:", 3000)
        self.streams.append((time.monotonic(), how))

    async def ask(self) -> None:
        """Short ones, without end."""
        while True:
            begun = time.monotonic()
            text, how = await self.outcome(PROMPT, 8)
            self.shorts.append(
                (begun, time.monotonic(), how if how != "complete" or text == self.expected else "wrong")
            )
            await asyncio.sleep(0.02)


async def ready(port: int) -> int:
    """Engines that are."""
    status, lines = await send(port, "/ready", None)
    return json.loads(lines[-1]).get("ready", 1) if status == 200 else 0


async def strike(engine: Path, expected: str, number: int, whom: str, options: list[str]) -> str:
    """What is to be printed of one fault."""
    async with server(engine, *options) as (port, process):
        clients = Clients(port, expected)
        streams = [asyncio.create_task(clients.stream()) for _ in range(8)]
        asking = asyncio.create_task(clients.ask())
        await asyncio.sleep(2)
        before = engines_of(process.pid)
        victim = min(before)
        os.kill(victim if whom == "engine" else parent_of(victim), number)
        fault = time.monotonic()
        assert not clients.streams, f"streams ended before the fault: {clients.streams}"
        while await ready(port) == len(before):  # nobody has noticed
            await asyncio.sleep(0.02)
        noticed = time.monotonic() - fault
        while await ready(port) < len(before):
            await asyncio.sleep(0.02)
        whole = time.monotonic() - fault
        while not any(begun > fault and how == "complete" for begun, _, how in clients.shorts):
            await asyncio.sleep(0.02)
        for task in (asking, *streams):  # those on the other replica go on
            task.cancel()
        await asyncio.gather(asking, *streams, return_exceptions=True)
    later = [(begun - fault, end - fault, how) for begun, end, how in clients.shorts if begun > fault]
    caught = [how for begun, end, how in clients.shorts if begun <= fault <= end]
    first = min(end for _, end, how in later if how == "complete")
    known = f"{max(end for end, _ in clients.streams) - fault:.2f}" if clients.streams else "-"
    ended = Counter(how for _, how in clients.streams) + Counter({"go on": 8 - len(clients.streams)})
    assert "wrong" not in {how for _, _, how in clients.shorts}
    return " | ".join((
        counted(ended), known, counted(Counter(caught)), counted(Counter(how for _, _, how in later)),
        f"{max(end - begun for begun, end, how in clients.shorts if end > fault):.2f}", f"{first:.2f}",
        f"{noticed:.2f}", f"{whole:.2f}",
    ))  # fmt: skip


def counted(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counter.items())) or "none"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    args = parser.parse_args()
    with LLM(args.engine) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        expected = llm.generate(PROMPT, params, progress=False)[0].outputs[0].text
    print("| fault | open streams | last knew | short request then open | later ones | the longest | first answer | "
          "not ready after | ready after |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, (number, whom, options) in FAULTS.items():
        print(f"| {name} | {await strike(args.engine, expected, number, whom, options)} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
