"""The folder of a training: one training at a time, and nothing of anything else in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...engines.errors import BuildError
from ...engines.writer import lock_folder, remove_empty
from ..checkpoint import read_header

STATE = "training.pt"  # where training stands


@contextmanager
def claimed(out: Path, force: bool) -> Iterator[None]:
    """The folder, made where it is not there and locked; one that nothing came into is removed again.

    Raises BuildError: it holds something else, or another training is at work in it.
    """
    _check_folder(out, force)
    made = [path for path in (out, *out.parents) if not path.exists()]  # the innermost first
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
    try:
        _check_folder(out, force)  # the training that was in it may have ended right here
        yield
    finally:
        remove_empty(made)
        if lock is not None:
            os.close(lock)


def _check_folder(out: Path, force: bool) -> None:
    if os.path.exists(out) and not out.is_dir():
        raise BuildError(f"{out} is not a directory; give -o a new directory")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if STATE in there or there <= {f"{STATE}.new"}:  # begun; the latter alone: it was killed right there
        return
    if not _is_head(out):  # as a model, its engine or a thesis
        raise BuildError(f"{out} holds something else than a head, which is not replaced; give -o a new directory")
    if not force:
        raise BuildError(f"{out} is there already; pass --force to replace what is in it, or give -o another directory")


def _is_head(folder: Path) -> bool:
    try:
        return any(tensor.name == "fc.weight" for tensor in read_header(folder / "model.safetensors"))
    except (OSError, BuildError):
        return False


@contextmanager
def disk(out: Path) -> Iterator[None]:
    """Raises BuildError for what the system says of writing there."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise BuildError(
            f"{out} cannot be written ({cause.strerror or cause}); free some space or mend it, and the same command "
            "goes on with the training that was saved there, or give -o another directory"
        ) from error
