"""The command line: `ingot build | calibrate | train-head | recipes | generate | bench | serve | route | inspect`, and
`build-engine`.

It stands at the root because builder and runtime never import each other. Heavy imports wait inside the commands.
A user's mistake ends in one sentence on stderr and an exit code: 2 bad input, build or request, 3 engine, 130 Ctrl-C,
143 SIGTERM. Anything else is a bug of ours: 70, and a traceback with `--debug`.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from . import __version__
from .builder.calibrate_cli import calibrate
from .builder.cli import build, recipes
from .builder.heads.cli import train_head
from .engines.cli import inspect
from .engines.errors import EngineError, IngotError
from .runtime.bench_cli import bench
from .runtime.cli import generate
from .runtime.server.cli import serve
from .runtime.server.router.cli import route


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with its errors turned into a sentence and an exit code. `--debug` lets them through."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except Exception as error:
            if options.get("debug"):
                raise
            raise SystemExit(_report(error)) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return run


def _report(error: Exception) -> int:
    match error:
        case typer.Exit() | typer.BadParameter():
            raise error
        case BrokenPipeError():  # the reader of our output has gone: `ingot generate .. | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        case IngotError():
            print(f"error: {str(error).rstrip('.')}.", file=sys.stderr)
            return 3 if isinstance(error, EngineError) else 2
        case OSError():  # a full disk behind our output, a file that nobody may read: no bug of ours
            print(f"error: {error.filename or 'reading or writing'}: {error.strerror or error}.", file=sys.stderr)
            return 2
        case _:
            what = " ".join(str(error).split())[:300]
            print(
                f"internal error: {type(error).__name__}: {what}; please report it with the output of --debug.",
                file=sys.stderr,
            )
            return 70


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ingot {__version__}")
        raise typer.Exit


_SETTINGS: dict[str, Any] = {
    "rich_markup_mode": "rich",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(invoke_without_command=True, **_SETTINGS)
build_app = typer.Typer(add_completion=False, **_SETTINGS)


@app.callback()
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it."),
) -> None:
    """Cast a Hugging Face decoder into an [bold]engine[/bold], and run it with in-flight batching."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


for each in (build, calibrate, train_head, recipes, generate, bench, serve, route, inspect):
    app.command()(reported(each))
build_app.command()(reported(build))


UsageError: Any = typer.BadParameter.__base__  # typer has a click of its own and does not export the class


def run(app: typer.Typer, name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run a command line and exit; a mistake in it is a sentence like any other."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a build that is stopped cleans up
    try:
        code = app(arguments, prog_name=name, standalone_mode=False)
    except UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else name
        print(f"error: {message}; see `{command} --help`.", file=sys.stderr)
        code = 2
    raise SystemExit(code or 0)


def main() -> None:
    run(app, "ingot")


def build_engine() -> None:
    run(build_app, "build-engine")


if __name__ == "__main__":
    main()
