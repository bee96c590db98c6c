"""`ingot train-head MODEL --text FILE -o DIR`: training with progress on stderr, what the head is worth on stdout."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...engines.cli import Debug
from ..calibrate_cli import Device

if TYPE_CHECKING:
    from .training import Agreement


def train_head(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The target's checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write it.", show_default=False)],
    text: Annotated[
        str, typer.Option(metavar="TEXT", help="A text file, JSON Lines, or a dataset of the hub.", show_default=False)
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on at most.")] = 1 << 20,
    epochs: Annotated[int, typer.Option(min=1, max=1000, help="Times that they are gone through.")] = 1,
    drafts: Annotated[int, typer.Option(min=1, max=16, help="Steps of drafting that it is trained for.")] = 3,
    draft_vocab: Annotated[int, typer.Option(min=0, help="Most frequent tokens that it can say; 0: all.")] = 0,
    width: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 4,
    learning_rate: Annotated[
        float, typer.Option(help="At its highest; it rises for 3% of the steps and falls.")
    ] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of the order of the text and of first weights.")] = 0,
    begin_with: Annotated[str, typer.Option(metavar="HEAD", help="Train this head on, instead of a new one.")] = "",
    reads: Annotated[
        str, typer.Option(metavar="LAYERS", help="Hidden states that it reads, as --hidden-states; EAGLE-3's if none.")
    ] = "",
    mlp_width: Annotated[int, typer.Option(min=0, max=1 << 20, help="Of its MLP; 0: as the target's.")] = 0,
    written: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the windows that the target goes on with itself.")
    ] = 0.0,
    seconds: Annotated[float, typer.Option(min=0, help="Of training at most, if the tokens last; 0: any.")] = 0.0,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what is already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Train an EAGLE-3 head, which drafts from a model's hidden states. What was stopped goes on with the same command.

    Then: build-engine MODEL -o TARGET --hidden-states eagle3; build-engine DIR -o HEAD --draft-for TARGET.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from ..cli import hush
    from .train import TrainConfig
    from .train import train_head as train

    if not debug:
        hush()
    config = TrainConfig(
        model,
        text,
        str(out),
        tokens,
        epochs,
        drafts,
        draft_vocab,
        width,
        batch,
        learning_rate,
        seed,
        begin_with,
        reads,
        mlp_width,
        written,
        seconds,
        device,
        force,
    )
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def on_step(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done, total=total, description=f"train, loss {loss:.3f}")

        def on_check(share: float, found: Agreement) -> None:
            console.print(f"{share:4.0%}: {_agreement(found)}", highlight=False, soft_wrap=True)

        found = train(config, lambda name: bar.update(task, description=name), on_step, on_check)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(found)}, indent=1))
        return
    print(f"{out}: on {'prompts' if written else 'text'} held out, {_agreement(found)}")


def _agreement(found: Agreement) -> str:
    shares = " ".join(f"{share:.2f}" for share in found.by_step)
    return (
        f"{shares} of the tokens agree with the target's by drafting step, {found.mean_length:.2f} tokens a "
        "verification"
    )
