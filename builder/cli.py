"""`build-engine MODEL -o DIR`, which is also `ingot build`: the build with progress on stderr, the result on stdout.
And `ingot recipes`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..engines.cli import Debug
from .calibrate_cli import KV, Data, Device, Model, Out, Tokens, Width

if TYPE_CHECKING:
    from ..engines.manifest import Manifest
    from . import BuildConfig


def build(
    model: Model = None,
    out: Out = None,
    retarget: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Compile this engine anew, for --target or its own; no MODEL. What is not given stays.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What the engine will run on: cpu (if none is given), cuda or tensorrt.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's own.", metavar="DTYPE")
    ] = "auto",
    quant: Annotated[str, typer.Option(help="Store weights in fewer bits: `ingot recipes`, or a YAML file.")] = "",
    kv_cache: KV = "",
    calibration_data: Data = "",
    calibration_tokens: Tokens = 1 << 15,
    calibration_width: Width = None,
    calibration_device: Device = "auto",
    hidden_states: Annotated[
        str, typer.Option(metavar="STATES", help="What heads are to read: eagle, eagle3, medusa, or numbers.")
    ] = "",
    draft_for: Annotated[
        str, typer.Option(metavar="TARGET", help="MODEL is a head that drafts for this checkpoint or engine.")
    ] = "",
    scales: Annotated[
        str, typer.Option(metavar="FILE", help="Of `ingot calibrate`, for --quant: nothing is searched for.")
    ] = "",
    accept_accuracy: Annotated[
        bool, typer.Option("--accept-accuracy", help="Build it even if it is worse than the recipe allows.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the engine that is already there.")] = False,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="cuda, tensorrt: sequences of a step at most; 256 if not given.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="cuda, tensorrt: tokens of a step at most; 4096 if not given.")
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(min=1, help="cuda, tensorrt: tokens of a KV page; 16 if not given.")
    ] = None,
    max_draft_tokens: Annotated[
        int | None, typer.Option(help="cuda: drafts of a sequence that a step can verify; none if not given.")
    ] = None,
    tune: Annotated[bool, typer.Option(help="cuda: time the kernels on the GPU at hand.")] = True,
    gpu_arch: Annotated[
        int | None,
        typer.Option("--gpu-arch", "--compute-capability", help="80, 86, 89, 90, 100 or 120, if not this GPU's."),
    ] = None,
    tensorrt_plugins: Annotated[
        str | None,
        typer.Option(metavar="OPS", help="tensorrt: ops that ingot runs although TensorRT could, with commas; Rope."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Phases, node counts, library warnings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Cast a checkpoint into an engine directory. A build that fails leaves nothing behind."""
    from . import BuildConfig

    if not verbose and not debug:
        hush()
    if (retarget is None) == (model is None) or (retarget is None) == (out is None):
        raise typer.BadParameter("Give MODEL and -o DIR, or --retarget DIR and neither of them.")
    out = out or retarget
    assert out is not None
    for_target = {
        "target": target, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens,
        "page_size": page_size, "max_draft_tokens": max_draft_tokens, "gpu_arch": gpu_arch,
        "tensorrt_plugins": tensorrt_plugins,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in for_target.items() if value is not None}
    config = BuildConfig(
        model or "", str(out), dtype=dtype, force=force, quant=quant, kv_cache=kv_cache,
        calibration_data=calibration_data, calibration_tokens=calibration_tokens, calibration_width=calibration_width,
        calibration_device=calibration_device, hidden_states=hidden_states, draft_for=draft_for, scales=scales,
        accept_accuracy=accept_accuracy, tune=tune, **given,
    )  # fmt: skip
    manifest = _build_with_progress(config, given, verbose)
    if as_json:
        print((out / "engine.json").read_text(), end="")
        return
    if verbose:
        _show_phases(out, manifest)
    if manifest.quantisation and "accuracy" in manifest.quantisation:
        from ..calibration.accuracy import Accuracy

        print(Accuracy.of(manifest.quantisation["accuracy"]).table())
    print(f"{out}: {manifest.num_bytes / 1e6:.1f} MB for {manifest.target}, built in {manifest.build.seconds:.1f} s")


def recipes() -> None:
    """What `--quant` knows: each recipe, by how much perplexity may rise, and its rules."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..calibration.recipe import recipes as known

    table = Table(box=box.SIMPLE)
    for column in ("recipe", "perplexity", "what it does", "rules"):
        table.add_column(column)
    for recipe in known():
        rules = "\n".join(f"{rule.match}: {rule.spelt()}" for rule in recipe.rules)
        rules += f"\nKV cache: {recipe.kv_cache.spelt()}" if recipe.kv_cache else ""
        table.add_row(recipe.name, f"+{100 * recipe.perplexity:g}% at most", recipe.description, rules)
    Console().print(table)


def _build_with_progress(config: BuildConfig, given: Collection[str], verbose: bool) -> Manifest:
    """Run the build under a spinner per phase, which becomes a bar where bytes are counted. given: fields of the config
    that an engine's own do not replace."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from . import build_engine
    from .retarget import as_built, check_options, retarget
    from .targets import Audience

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def on_phase(name: str) -> None:
            if verbose and not console.is_terminal:
                console.print(name)  # a log has no use for a bar
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(name, total=None)

        def on_bytes(done: int, total: int) -> None:
            bar.update(bar.task_ids[-1], completed=done, total=total)

        def on_note(note: str) -> None:
            console.print(note, highlight=False, soft_wrap=True)

        if not config.model:
            check_options(config)
            config = as_built(config, given, on_note)
            on_phase(f"compile for {config.target}")
            return retarget(Path(config.out), config, Audience(on_bytes, on_note))
        return build_engine(config, on_phase, on_bytes, on_note=on_note)


def _show_phases(out: Path, manifest: Manifest) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..engines.cli import show
    from ..engines.inspect import describe

    table = Table(box=box.SIMPLE)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    for name, seconds in manifest.build.phases.items():
        table.add_row(name, f"{seconds:.2f}")
    console = Console()
    console.print(table)
    nodes = " -> ".join(f"{count} {name}" for name, count in manifest.build.num_nodes.items())
    console.print(f"nodes: {nodes}")
    show(describe(out, manifest) | {"verified": True})


def hush() -> None:
    """Errors alone belong on stderr: the libraries' warnings about our use of them help no user."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
