"""Which tactic runs a site: the fastest on the GPU at hand, or the likeliest where there is none."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.errors import BuildError
from ...plugins import tactics_of
from ...plugins.gpu import Gpu
from ...plugins.tactic import Device, Site, Tactic
from .cubin import Binary, Source, compile_all
from .planner import Planner, Sizes, key_of
from .timing import Timer

UNTIMED = ("Unpack", "Sample")  # microseconds that depend on what the host packed and requests ask for


@dataclass(frozen=True)
class Candidates:
    """The ways to run a site; `node` is the first that has it."""

    site: Site
    node: str
    tactics: list[Tactic]


@dataclass(frozen=True)
class Choice:
    """The tactic of a site with its cubins. microseconds: timed with cold weights; None: it was not timed."""

    site: Site
    tactic: Tactic
    cubins: Mapping[Source, Binary]
    microseconds: float | None = None
    num_timed: int = 0

    def describe(self) -> dict[str, Any]:
        """For the plan: what runs where, and how fast."""
        return {
            "op": self.site.op, "attributes": dict(self.site.attributes),
            "inputs": [t and [t.shape, t.dtype, t.cold] for t in self.site.inputs],
            "outputs": [[t.shape, t.dtype, t.cold] for t in self.site.outputs],
            "max_query": self.site.max_query, "max_context": self.site.max_context,
            "tactic": self.tactic.name, "us": self.microseconds,
            "of": self.num_timed,
        }  # fmt: skip


def candidates(planner: Planner, sizes: Iterable[Sizes]) -> dict[Hashable, Candidates]:
    """Every site of all buckets once. Raises BuildError for a node without a tactic."""
    found: dict[Hashable, Candidates] = {}
    for bucket in sizes:
        for work in planner.sites(bucket):
            site, key = work.site, key_of(work.site)
            if key in found:
                continue
            name = planner.nodes[work.node] if work.node >= 0 else site.op
            tactics_for = tactics_of(site.op)
            tactics = tactics_for(site) if tactics_for else []
            if not tactics:
                shapes = ", ".join("-" if t is None else f"{t.dtype}{list(t.shape)}" for t in site.inputs)
                raise BuildError(
                    f"the cuda target has no kernel for node '{name}' ({site.op} of {shapes}); "
                    "build for `--target cpu`, or report the model."
                )
            found[key] = Candidates(site, name, tactics)
    return found


def likeliest(found: Mapping[Hashable, Candidates], device: Device) -> dict[Hashable, Choice]:
    """The first tactic of each site that compiles."""
    chosen: dict[Hashable, Choice] = {}
    rank = 0
    compiled: dict[Source, Binary | BuildError] = {}
    while missing := {key: each for key, each in found.items() if key not in chosen}:
        for each in missing.values():
            if rank == len(each.tactics):
                raise _nothing_compiles(each, compiled)
        kernels = {launch.kernel for each in missing.values() for launch in each.tactics[rank].launches}
        compiled |= compile_all(kernels - compiled.keys(), device.capability)
        for key, each in missing.items():
            cubins = _cubins(each.tactics[rank], compiled)
            if cubins is not None:
                chosen[key] = Choice(each.site, each.tactics[rank], cubins)
        rank += 1
    return chosen


def timed(found: Mapping[Hashable, Candidates], gpu: Gpu) -> dict[Hashable, Choice]:
    """The fastest tactic of each site on `gpu`."""
    chosen = likeliest({key: each for key, each in found.items() if each.site.op in UNTIMED}, gpu.device)
    kernels = {
        launch.kernel
        for each in found.values()
        if each.site.op not in UNTIMED
        for tactic in each.tactics
        for launch in tactic.launches
    }
    compiled = compile_all(kernels, gpu.device.capability)
    with Timer(gpu) as timer:
        for key, each in found.items():
            if each.site.op in UNTIMED:
                continue
            times: list[tuple[float, int, Tactic, dict[Source, Binary]]] = []
            for tactic in each.tactics:
                cubins = _cubins(tactic, compiled)
                if cubins is not None:
                    times.append((timer.microseconds(each.site, tactic, cubins), len(times), tactic, cubins))
            if not times:
                raise _nothing_compiles(each, compiled)
            us, _, tactic, cubins = min(times, key=lambda entry: entry[:2])
            chosen[key] = Choice(each.site, tactic, cubins, round(us, 2), len(times))
    return chosen


def _cubins(tactic: Tactic, compiled: Mapping[Source, Binary | BuildError]) -> dict[Source, Binary] | None:
    """The cubins of a tactic, None if one of its kernels did not compile."""
    cubins = {}
    for launch in tactic.launches:
        cubin = compiled[launch.kernel]
        if isinstance(cubin, BuildError):
            return None
        cubins[launch.kernel] = cubin
    return cubins


def _nothing_compiles(each: Candidates, compiled: Mapping[Source, Binary | BuildError]) -> BuildError:
    errors = [compiled[launch.kernel] for tactic in each.tactics for launch in tactic.launches]
    first = next(str(error) for error in errors if isinstance(error, BuildError))
    return BuildError(f"no kernel for node '{each.node}' ({each.site.op}) compiles: {first}")
