"""Which tactic runs a site: the fastest on the GPU at hand, or the likeliest where there is none.

Timing is a matter of a minute for a large model, so times are kept on disk (`timing_cache.py`): a site that is in the
cache is not timed, and of its tactics only the fastest is compiled. Where nothing is timed, what was measured elsewhere
puts the tactics in order (`table.py`), and the first that this architecture can run is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ...engines.errors import BuildError
from ...plugins import tactics_of
from ...plugins.gpu import Gpu
from ...plugins.tactic import Device, Gemm, Site, Tactic
from .agreement import COMPARED, strangers
from .buckets import Sizes
from .cubin import Binary, Source, compile_all
from .planner import Planner, key_of
from .steps import steps
from .table import Table
from .timing import Timer
from .timing_cache import Times, TimingCache

# microseconds that depend on what the host packed, where slots are and what requests ask for
UNTIMED = ("Unpack", "Draft", "DraftHead", "Grow", "KeepStates", "MoveRows", "ReadStates", "Sample")
LONG_US = 150.0  # from here on the best are timed under load, too
CONTENDERS, CLOSE = 8, 1.4  # as many at most, and none that takes so much longer than the fastest
MOST_DESCRIBED = 4  # of the times of a site in the plan

Compiled = Mapping[Source, Binary | BuildError]


@dataclass(frozen=True)
class Candidates:
    """The ways to run a site; `node` is the first that has it."""

    site: Site
    node: str
    tactics: list[Tactic]

    @property
    def names(self) -> list[str]:
        return [tactic.name for tactic in self.tactics]


@dataclass(frozen=True)
class Choice:
    """The tactic of a site with its cubins. ranking: microseconds with cold weights of each tactic that runs, the
    fastest first; empty: they were not timed. note: what is wrong with the fastest, "" if nothing is."""

    site: Site
    tactic: Tactic
    cubins: Mapping[Source, Binary]
    ranking: tuple[tuple[Tactic, float], ...] = ()
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """For the plan: what runs where, how fast (`us`), of how many, the `times` of the best few, and any `note`."""
        us = round(self.ranking[0][1], 2) if self.ranking else None
        found = {"tactic": self.tactic.name, "us": us, "of": len(self.ranking), "times": self._times()}
        return self._site() | found | ({"note": self.note} if self.note else {})

    def _site(self) -> dict[str, Any]:
        """All its fields but the device, which the plan is for."""
        found = {field.name: getattr(self.site, field.name) for field in fields(Site) if field.name != "device"}
        tensors = {kind: [t and [t.shape, t.dtype, t.cold] for t in found[kind]] for kind in ("inputs", "outputs")}
        return found | tensors | {"attributes": dict(self.site.attributes)}

    def _times(self) -> dict[str, float]:
        """The best tactics; one of our own is among them, since cuBLASLt's are not offered without a GPU."""
        best = list(self.ranking[:MOST_DESCRIBED])
        own = [each for each in self.ranking if not any(isinstance(e.kernel, Gemm) for e in each[0].launches)]
        if own and own[0] not in best:
            best[-1] = own[0]
        return {tactic.name: round(us, 2) for tactic, us in best}


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


def likeliest(
    found: Mapping[Hashable, Candidates], device: Device, table: Table | None = None
) -> dict[Hashable, Choice]:
    """The first tactic of each site, in the order of the table, that runs on the architecture."""
    chosen: dict[Hashable, Choice] = {}
    rank = 0
    compiled: dict[Source, Binary | BuildError] = {}
    order = {key: table.order(each.site, each.tactics) if table else each.tactics for key, each in found.items()}
    while missing := {key: each for key, each in found.items() if key not in chosen}:
        for each in missing.values():
            if rank == len(each.tactics):
                raise _nothing_compiles(each, compiled)
        compiled |= _compile([order[key][rank] for key in missing], device.capability, compiled)
        for key, each in missing.items():
            tactic = order[key][rank]
            cubins = _cubins(tactic, compiled)
            if cubins is not None:
                chosen[key] = Choice(each.site, tactic, cubins)
        rank += 1
    return chosen


def timed(found: Mapping[Hashable, Candidates], gpu: Gpu, cache: TimingCache | None = None) -> dict[Hashable, Choice]:
    """The fastest tactic of each site on `gpu`; what the cache does not know is timed and added to it."""
    capability = gpu.device.capability
    chosen = likeliest({key: each for key, each in found.items() if each.site.op in UNTIMED}, gpu.device)
    asked = {key: each for key, each in found.items() if each.site.op not in UNTIMED}
    if cache:
        known = {key: times for key, each in asked.items() if (times := cache.read(each.site, each.names))}
        winners = [_ranking(asked[key].tactics, times)[0][0] for key, times in known.items()]
        compiled = _compile(winners, capability)
        for key, times in known.items():
            if choice := _fastest(asked[key], times, compiled):
                chosen[key] = choice
        cache.num_sites += len(asked)
        cache.num_hits += len(asked.keys() & chosen.keys())
    missing = {key: each for key, each in asked.items() if key not in chosen}
    if not missing:
        return chosen
    compiled = _compile([tactic for each in missing.values() for tactic in each.tactics], capability)
    with Timer(gpu) as timer:
        for key, each in missing.items():
            times = _times(timer, each, compiled)
            times, note = _compared(timer, each, compiled, times)
            choice = _fastest(each, times, compiled)
            if choice is None:
                raise _nothing_compiles(each, compiled)
            chosen[key] = replace(choice, note=note)
            if cache:
                cache.write(each.site, each.names, times)
    return chosen


def _times(timer: Timer, each: Candidates, compiled: Compiled) -> list[float | None]:
    """Each tactic alone; where they take long the best of them also under load, and the others as much slower."""
    tactics = enumerate(each.tactics)
    runs = {i: (tactic, cubins) for i, tactic in tactics if (cubins := _cubins(tactic, compiled)) is not None}
    times = {i: timer.microseconds(each.site, *run) for i, run in runs.items()}
    fastest = min(times.values(), default=0.0)
    if fastest > LONG_US:
        best = [i for i in sorted(times, key=times.__getitem__)[:CONTENDERS] if times[i] < CLOSE * fastest]
        loaded = dict(zip(best, timer.under_load(each.site, [runs[i] for i in best]), strict=True))
        slower = max(us / times[i] for i, us in loaded.items())
        times = {i: loaded.get(i, us * slower) for i, us in times.items()}
    return [round(times[i], 3) if i in times else None for i in range(len(each.tactics))]


def _compared(
    timer: Timer, each: Candidates, compiled: Compiled, times: list[float | None]
) -> tuple[list[float | None], str]:
    """The times without those of tactics that compute something else than most of the fastest few, and a note of them.

    On the last step, in which sequences differ most.
    """
    known = {i: us for i, us in enumerate(times) if us is not None}
    fastest = sorted(known, key=known.__getitem__)[:COMPARED]
    if len(fastest) < 2:
        return times, ""
    runs = [(each.tactics[i], _cubins(each.tactics[i], compiled) or {}) for i in fastest]
    apart = strangers(timer.outputs(each.site, runs, steps(each.site)[-1]))
    names = [each.names[i] for i in fastest]
    if apart is None:
        return times, f"no majority of {_listed(names)} computes the same on this GPU; please report it"
    if not apart:
        return times, ""
    wrong = [fastest[i] for i in apart]
    note = f"left out {_listed(each.names[i] for i in wrong)}, which computed something else than most others did"
    return [None if i in wrong else us for i, us in enumerate(times)], f"{note} on this GPU; please report it"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _compile(tactics: Iterable[Tactic], capability: int, done: Collection[Source] = ()) -> dict[Source, Any]:
    """What the tactics launch, compiled."""
    sources = dict.fromkeys(launch.kernel for tactic in tactics for launch in tactic.launches)
    return compile_all([source for source in sources if source not in done], capability)


def _ranking(tactics: Iterable[Tactic], times: Times) -> list[tuple[Tactic, float]]:
    """The tactics that run with their times, the fastest first, of equal ones the likelier."""
    both = [(tactic, us) for tactic, us in zip(tactics, times, strict=True) if us is not None]
    return sorted(both, key=lambda entry: entry[1])


def _fastest(each: Candidates, times: Times, compiled: Compiled) -> Choice | None:
    """None: nothing runs, or the fastest does not compile."""
    ranking = _ranking(each.tactics, times)
    cubins = _cubins(ranking[0][0], compiled) if ranking else None
    return None if cubins is None else Choice(each.site, ranking[0][0], cubins, tuple(ranking))


def _cubins(tactic: Tactic, compiled: Compiled) -> dict[Source, Binary] | None:
    """The cubins of a tactic, None if one of its kernels did not compile."""
    cubins = {}
    for launch in tactic.launches:
        cubin = compiled[launch.kernel]
        if isinstance(cubin, BuildError):
            return None
        cubins[launch.kernel] = cubin
    return cubins


def _nothing_compiles(each: Candidates, compiled: Compiled) -> BuildError:
    errors = [compiled[launch.kernel] for tactic in each.tactics for launch in tactic.launches]
    first = next(str(error) for error in errors if isinstance(error, BuildError))
    return BuildError(f"no kernel for node '{each.node}' ({each.site.op}) compiles: {first}")
