"""Default tactics where nothing is timed: what was measured on a GPU of some architecture, asked by nearness.

A site that was measured gets the tactic that won there. One that never was gets that of the nearest measured one of the
same op, element types and kind (decoding or not); near means sizes that differ by few octaves, and shapes of models
lie close enough together for that. A tactic that this site does not offer is passed over for what comes next, and
behind all of them stands the op's own order. The files in `defaults/` are made by `tabulate.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ...plugins.tactic import Site, Tactic, Tensor

FOLDER = Path(__file__).parent / "defaults"
SHAPED = ("op", "attributes", "inputs", "outputs", "device")  # fields of a site; the others are single numbers
ALIKE = {"float16": "bfloat16"}  # element types that take the same time
OTHERWISE = 1.0  # octaves that count for a word that differs, or for an operand that only one of two sites has
FURTHEST_NAME = 1.0  # octaves between the numbers in two names of which one may stand for the other


@dataclass(frozen=True)
class Measured:
    """A site and the names of its tactics, the fastest first."""

    site: Site
    tactics: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What was measured for GPUs of a compute capability; source says where, or that it was not."""

    capability: int
    source: str
    measured: tuple[Measured, ...]

    def describe(self) -> str:
        return f"table sm_{self.capability} ({self.source})"

    def order(self, site: Site, tactics: list[Tactic]) -> list[Tactic]:
        """The candidates of a site, the likeliest to be the fastest first."""
        near = [(distance(site, each.site), each.tactics) for each in self.measured if comparable(site, each.site)]

        def score(tactic: Tactic) -> tuple[float, int]:
            scores = ((far + apart(name, tactic.name), i) for far, names in near for i, name in enumerate(names))
            return min(scores, default=(math.inf, 0))

        return sorted(tactics, key=score)

    def save(self, path: Path) -> None:
        """One line a site, below the line of what it shares with others."""
        groups: dict[str, list[str]] = {}
        for each in self.measured:
            tensors = [t for t in (*each.site.inputs, *each.site.outputs) if t is not None]
            shapes = " ".join(_json(t.shape) for t in tensors)
            groups.setdefault(_json(_header(each.site)), []).append(f"    {_json(shapes)}: {_json(each.tactics)}")
        blocks = [f'  {header[:-1]},"sites":{{\n' + ",\n".join(sites) + "}}" for header, sites in groups.items()]
        head = f'{{"capability":{self.capability},\n"source":{_json(self.source)},\n"groups":[\n'
        path.write_text(head + ",\n".join(blocks) + "]}\n", encoding="utf-8")

    @classmethod
    def open(cls, path: Path) -> Table:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["capability"], content["source"], tuple(_measured(content["groups"])))


@cache
def default_table(capability: int) -> Table:
    """The table for GPUs of `capability`: its own, or that of the newest architecture before it."""
    found = {int(path.stem.removeprefix("sm_")): path for path in FOLDER.glob("sm_*.json")}
    return Table.open(found[max((each for each in found if each <= capability), default=min(found))])


def comparable(one: Site, other: Site) -> bool:
    """Whether what is fast for one says something about the other."""
    if one.op != other.op or (one.max_query == 1) != (other.max_query == 1):
        return False
    both = [(a.dtype, b.dtype) for a, b in _operands(one, other) if a is not None and b is not None]
    return all(ALIKE.get(a, a) == ALIKE.get(b, b) for a, b in both)


def distance(one: Site, other: Site) -> float:
    """Euclidean, over all sizes of the operands, the attributes and what else the sites consist of, in octaves."""
    total = 0.0
    for a, b in _operands(one, other):
        if a is None or b is None:
            total += 0.0 if a is b else OTHERWISE**2
            continue
        total += sum(_octaves(m, n) ** 2 for m, n in zip_longest(a.shape, b.shape, fillvalue=1))
    for name in sorted({*one.attributes, *other.attributes}):
        total += _octaves(one.attributes.get(name), other.attributes.get(name)) ** 2
    total += sum(_octaves(getattr(one, name), getattr(other, name)) ** 2 for name in _numbers())
    return math.sqrt(total)


@cache
def apart(one: str, other: str) -> float:
    """Between names of tactics: octaves between their numbers; infinite if they differ in words, or too much.

    Numbers in names are sizes of tiles or shares of the work; some follow from the site's shape or from the GPU.
    """
    words, numbers = _split(one)
    others, theirs = _split(other)
    if words != others:
        return math.inf
    far = math.hypot(*(_octaves(m, n) for m, n in zip(numbers, theirs, strict=True)))
    return far if far <= FURTHEST_NAME else math.inf


def _split(name: str) -> tuple[list[str], list[int]]:
    return re.split(r"\d+", name), [int(digits) for digits in re.findall(r"\d+", name)]


def _operands(one: Site, other: Site) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    yield from zip_longest(one.inputs, other.inputs)
    yield from zip_longest(one.outputs, other.outputs)


def _octaves(one: Any, other: Any) -> float:
    if one == other:
        return 0.0
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return OTHERWISE
    small, large = sorted((abs(one), abs(other)))
    return math.log2(large / small if small >= 1 else (1 + large) / (1 + small))


def _numbers() -> list[str]:
    return [field.name for field in fields(Site) if field.name not in SHAPED]


def _header(site: Site) -> dict[str, Any]:
    """What sites of a group have in common: everything but shapes."""
    types = {kind: [t and t.dtype for t in getattr(site, kind)] for kind in ("inputs", "outputs")}
    rest = {name: getattr(site, name) for name in _numbers()}
    return {"op": site.op, "attributes": dict(sorted(site.attributes.items())), **types, **rest}


def _measured(groups: list[Mapping[str, Any]]) -> Iterator[Measured]:
    for group in groups:
        # a number that sites no longer have says nothing
        rest = {name: group[name] for name in _numbers() if name in group}
        for shapes, tactics in group["sites"].items():
            left = iter(shapes.split(" "))
            tensors: dict[str, Any] = {
                kind: tuple(t and Tensor(tuple(json.loads(next(left))), t) for t in group[kind])
                for kind in ("inputs", "outputs")
            }
            site = Site(group["op"], group["attributes"], **tensors, **rest)
            yield Measured(site, tuple(tactics))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
