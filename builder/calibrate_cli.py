"""`ingot calibrate MODEL -o FILE`: the search alone, with progress on stderr; and what such a file holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engines.cli import Debug

if TYPE_CHECKING:
    from ..calibration.scales import Scales
    from . import BuildConfig

# what `build-engine` takes, too
Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.", show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="PATH", help="Where to write it.", show_default=False)]
Data = Annotated[
    str, typer.Option(metavar="TEXT", help="A text file, JSON Lines, or a dataset of the hub: org/name[:split].")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to calibrate with at most; 8192 or more for GPTQ.")]
Width = Annotated[int | None, typer.Option(min=2, help="Tokens of a window; 512, or less if there is little text.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU if there is one.")]
KV = Annotated[str, typer.Option(help="Keys and values in 8 bits: fp8 or int8, fp8-head, int8-head, fp8-centred.")]


def calibrate(
    model: Model = None,
    out: Out = None,
    quant: Annotated[str, typer.Option(help="A recipe: `ingot recipes`, or a YAML file.")] = "",
    kv_cache: KV = "",
    calibration_data: Data = "",
    calibration_tokens: Tokens = 1 << 15,
    calibration_width: Width = None,
    calibration_device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="As in the build that will use it.", metavar="DTYPE")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the file that is already there.")] = False,
    show: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show what such a file holds; no MODEL.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what it is about as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Find the scales of a recipe and keep them in a file, for `build-engine --scales`, on any target.

    One that was stopped leaves FILE.calibration; the same command goes on where it was.
    """
    from . import BuildConfig
    from .cli import hush

    if show is not None:
        if model is not None or out is not None:
            raise typer.BadParameter("Give MODEL and -o FILE, or --show FILE and neither of them.")
        from ..calibration.scales import Scales

        _show(Scales.open(show), show, as_json)
        return
    for name, value in (("MODEL", model), ("-o FILE", out), ("--quant RECIPE or --kv-cache", quant or kv_cache),
                        ("--calibration-data TEXT", calibration_data)):  # fmt: skip
        if not value:
            raise typer.BadParameter(f"Give {name}.")
    assert model is not None and out is not None
    if not debug:
        hush()
    config = BuildConfig(
        model, str(out), dtype=dtype, force=force, quant=quant, kv_cache=kv_cache, calibration_data=calibration_data,
        calibration_tokens=calibration_tokens, calibration_width=calibration_width,
        calibration_device=calibration_device,
    )  # fmt: skip
    scales = _with_progress(config)
    if as_json:
        print(json.dumps(scales.about, indent=1))
        return
    from ..calibration.accuracy import Accuracy

    print(Accuracy.of(scales.about["accuracy"]).table())
    options = " ".join(f"{name} {value}" for name, value in (("--quant", quant), ("--kv-cache", kv_cache)) if value)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, for build-engine {model} {options} --scales {out}")


def _with_progress(config: BuildConfig) -> Scales:
    """A spinner for each phase, which becomes a bar of nodes with the name of the layer."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from . import find_scales

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("{task.fields[layer]}"))  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def on_phase(name: str) -> None:
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(name, total=None, layer="")

        def on_node(done: int, total: int, name: str) -> None:
            bar.update(bar.task_ids[-1], completed=done, total=total)
            if name:
                bar.update(bar.task_ids[-1], layer=name)

        return find_scales(config, on_phase, on_node, lambda note: console.print(note, highlight=False, soft_wrap=True))


def _show(scales: Scales, path: Path, as_json: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..calibration.accuracy import Accuracy

    rows = list(_rows(scales))
    if as_json:
        print(json.dumps({"about": scales.about, "holds": rows}, indent=1))
        return
    console, about = Console(), scales.about
    recipe = about.get("recipe", {})
    console.print(f"{path}: recipe {recipe.get('name')}, {len(rows)} entries", highlight=False)
    console.print(f"model {about.get('model', '')[:12]}, text {about.get('text', '')[:12]}", highlight=False)
    if "accuracy" in about:
        console.print(Accuracy.of(about["accuracy"]).table(), highlight=False)
    table = Table(box=box.SIMPLE)
    for column in ("what", "of", "shape", "smallest", "largest"):
        table.add_column(column, justify="right" if column in ("smallest", "largest") else "left", overflow="fold")
    for row in rows:
        table.add_row(row["what"], row["of"], str(row["shape"]), f"{row['smallest']:.4g}", f"{row['largest']:.4g}")
    console.print(table)


def _rows(scales: Scales) -> Iterator[dict[str, Any]]:
    """One for each tensor that was found, in a reader's order."""
    from ..calibration.scales import KINDS

    for name in sorted(scales.weights):
        quantised = scales.weights[name]
        form = quantised.format
        shared = f", groups of {form.group}" if form.group else ""
        yield _row(f"{form.dtype} weight{shared}", name, list(quantised.values.shape), quantised.scale)
    for kind in KINDS:
        for name, tensor in sorted(getattr(scales, kind).items()):
            yield _row(kind, name, list(tensor.shape), tensor)


def _row(what: str, name: str, shape: list[int], numbers: Any) -> dict[str, Any]:
    return {"what": what, "of": name, "shape": shape, "smallest": float(numbers.min()), "largest": float(numbers.max())}
