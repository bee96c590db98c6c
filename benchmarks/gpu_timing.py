"""How the GPU benchmarks measure: replays of a CUDA graph between events, and the speed at which memory is read."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from ingot.plugins.tactic import Device


def replay_ms(run: Callable[[], Any], repeats: int = 15) -> float:
    """Milliseconds of `run` captured in a graph, median; it was called once before, so that nothing compiles."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def read_speed(gigabytes: int = 8) -> float:
    """Bytes a second at which torch sums memory far larger than the caches. A floor of the ceiling, not the ceiling."""
    data = torch.ones(gigabytes << 28, device="cuda")
    return data.nbytes / replay_ms(data.sum) * 1000


def device() -> Device:
    """The GPU at hand, as tactics see it."""
    properties = torch.cuda.get_device_properties(0)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)
