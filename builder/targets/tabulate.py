"""Makes a table of default tactics from tuned plans, and tables of other architectures from that one.

    python -m ingot.builder.targets.tabulate ENGINE/cuda/plan.json ... -o builder/targets/defaults/sm_90.json \\
        --source "measured on NVIDIA H100 80GB HBM3, 2026-11-24, Triton 3.6.0, cuBLASLt 13.1" \\
        --derive 80 86 89 100 120

A site that several plans timed is taken from the last of them. A derived table keeps the tactics that its architecture
offers for the same site, and says that nothing was measured. The same plans always give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...engines.errors import BuildError
from ...plugins import tactics_of
from ...plugins.tactic import Device, Site, Tensor
from .cuda import SMS
from .table import Measured, Table, apart


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN", help="plan.json or plan.json.gz, timed on a GPU")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the table")
    parser.add_argument("--source", required=True, help="where and with which versions the plans were tuned")
    parser.add_argument("--derive", type=int, nargs="+", default=[], choices=list(SMS), metavar="ARCH",
                        help="architectures whose tables are derived from this one, in sm_ARCH.json")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        table = tabulate([read_plan(path) for path in options.plans], options.source)
    except BuildError as error:
        parser.error(str(error))
    if table.capability in options.derive:
        parser.error(f"sm_{table.capability} is what the plans were timed on; leave it out of --derive.")
    tables = {options.out: table}
    for capability in options.derive:
        tables[options.out.with_name(f"sm_{capability}.json")] = derive(table, capability)
    for path, each in tables.items():
        each.save(path)
        print(f"{path}: {len(each.measured)} sites, {each.source}")


def read_plan(path: Path) -> dict[str, Any]:
    """A plan's fields. Raises BuildError: no such file, or no plan."""
    try:
        data = path.read_bytes()
        plan = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        return {name: plan[name] for name in ("capability", "tactics")}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path} is no plan ({error}); expected the cuda/plan.json of an engine.") from None


def tabulate(plans: Sequence[dict[str, Any]], source: str) -> Table:
    """The sites of which the plans timed several tactics. Raises BuildError: there are none, or of different GPUs."""
    capabilities = {plan["capability"] for plan in plans}
    if len(capabilities) != 1:
        raise BuildError(f"the plans are for the architectures {sorted(capabilities)}, expected one; give one's plans.")
    entries = [entry for plan in plans for entry in plan["tactics"] if entry["of"] > 1]
    if not entries:
        raise BuildError("the plans hold no timed tactics; build the engine on a GPU, without --no-tune.")
    found: dict[str, Measured] = {}
    for entry in entries:
        site = site_of(entry)
        names = entry.get("times") or [entry["tactic"]]  # a plan that holds no ranking holds the winner
        found[repr(site)] = Measured(site, tuple(names))
    return Table(capabilities.pop(), source, tuple(found.values()))


def site_of(entry: dict[str, Any]) -> Site:
    """The site of an entry of a plan's `tactics`, on any device."""
    known = {field.name: entry[field.name] for field in fields(Site) if field.name in entry}
    known["attributes"] = dict(sorted(entry["attributes"].items()))
    tensors = {kind: tuple(t and Tensor(tuple(t[0]), t[1]) for t in entry[kind]) for kind in ("inputs", "outputs")}
    return Site(**known | tensors)


def derive(table: Table, capability: int) -> Table:
    """The table for another architecture."""
    device = Device(capability, SMS[capability], cublas=True)
    found = []
    for each in table.measured:
        tactics_for = tactics_of(each.site.op)
        offered = [tactic.name for tactic in tactics_for(replace(each.site, device=device))] if tactics_for else []
        names = [name for name in each.tactics if any(apart(name, other) < math.inf for other in offered)]
        if names:
            found.append(Measured(each.site, tuple(names)))
    return Table(capability, f"derived from sm_{table.capability}, not measured", tuple(found))


if __name__ == "__main__":
    main()
