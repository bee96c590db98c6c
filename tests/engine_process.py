"""What the tests of the engine process share: requests, waiting, and what the system says of a process."""

import asyncio
import os
import time
from pathlib import Path

from ingot import SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = "def main():\n"


async def all_of(engine, prompt, params=SHORT, request_id=None, **how):
    return [output async for output in engine.generate(prompt, params, request_id, **how)]


async def last_of(engine, prompt, params=SHORT, request_id=None):
    return (await all_of(engine, prompt, params, request_id))[-1]


async def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.02)


def wait_for(condition, seconds=120.0):
    """The same beside an event loop that is another process's."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def idle(engine):
    metrics = engine.metrics()
    return metrics.running == 0 and metrics.waiting == 0 and metrics.kv_utilisation == 0


def alive(pid):
    """Neither gone nor dead and waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def cpu_seconds(pid):
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
