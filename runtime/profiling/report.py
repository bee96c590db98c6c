"""A report of profiles: in the terminal, as JSON, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .floor import Ceilings
from .table import Profile

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Report:
    """Profiles of one engine on one device."""

    engine: str
    device: str
    ceilings: Ceilings
    profiles: tuple[Profile, ...]

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "engine": self.engine, "device": self.device, "bytes_per_s": self.ceilings.bytes_per_s,
            "flops_per_s": self.ceilings.flops_per_s, "profiles": [profile.describe() for profile in self.profiles],
        }  # fmt: skip

    @property
    def title(self) -> str:
        return (
            f"{Path(self.engine).name} on {self.device}: reads {self.ceilings.bytes_per_s / 1e9:.0f} GB/s, "
            f"multiplies {self.ceilings.flops_per_s / 1e12:.2f} TFLOP/s (both measured now)"
        )


def show(report: Report, console: Console) -> None:
    """A table for each profile, its totals below."""
    from rich import box
    from rich.table import Table

    console.print(report.title, highlight=False)
    for profile in report.profiles:
        table = Table(box=box.SIMPLE, title=profile.title, title_justify="left")
        table.add_column("op of a step")
        for column in ("launches", "us", "share", "floor us", "x floor"):
            table.add_column(column, justify="right")
        for row in profile.rows:
            table.add_row(
                row.op, str(row.launches), f"{row.us:.1f}", f"{row.us / profile.wall_us:.1%}", f"{row.floor_us:.1f}",
                f"{row.ratio:.2f}" if row.floor_us else "-",
            )  # fmt: skip
        table.add_section()
        launches = sum(row.launches for row in profile.rows)
        table.add_row(
            "all", str(launches), f"{profile.busy_us:.1f}", f"{profile.busy_us / profile.wall_us:.1%}",
            f"{profile.floor_us:.1f}", f"{profile.busy_us / profile.floor_us:.2f}",
        )  # fmt: skip
        console.print(table)
        console.print(
            f"step {profile.wall_us:.1f} us, {profile.idle:.1%} of it idle, {profile.wall_us / profile.floor_us:.2f} x "
            f"floor; ops without their overlaps {profile.busy_us:.1f} us, with them {profile.summed_us:.1f}. "
            f"Not traced: {profile.untraced_us:.1f} us a step, {profile.host_us:.1f} us of the host. "
            f"Mean of {profile.num_steps} steps.\n",
            highlight=False,
        )


def draw(report: Report, path: Path) -> None:
    """Bars of time for each op with its floor marked, a panel for each profile. Raises ImportError: no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [2 + len(_bars(profile)) for profile in report.profiles]
    figure, panels = pyplot.subplots(
        len(heights), 1, figsize=(9, 0.3 * sum(heights) + 0.6), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, profile in zip(panels[:, 0], report.profiles, strict=True):
        bars = _bars(profile)
        places = range(len(bars))
        axis.barh(places, [us for _, us, _ in bars], color="tab:blue", label="time")
        marked = [(i, floor) for i, (_, _, floor) in enumerate(bars) if floor]
        floors = [floor for _, floor in marked]
        axis.vlines(floors, [i - 0.45 for i, _ in marked], [i + 0.45 for i, _ in marked], "tab:orange", lw=3,
                    label="floor")  # fmt: skip
        for i, (_, us, floor) in enumerate(bars):
            text = f" {us:.0f}" + (f", {us / floor:.2f} x" if floor else "")
            axis.text(max(us, floor), i, text, va="center", fontsize=8)
        axis.set_yticks(places, [name for name, _, _ in bars], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel("microseconds of a step")
        axis.set_title(f"{profile.title}: {profile.wall_us:.0f} us", fontsize=10, loc="left")
        axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(report.title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(profile: Profile) -> Sequence[tuple[str, float, float]]:
    """(name, microseconds, floor), the time in which nothing runs among them."""
    idle = max(0.0, profile.wall_us - profile.busy_us)
    return [*((row.op, row.us, row.floor_us) for row in profile.rows), ("idle", idle, 0.0)]
