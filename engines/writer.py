"""The atomic writer of an engine directory: all of it, or nothing.

An engine is filled in `DIR.partial-PID` beside its destination and renamed when `engine.json` is in it; one that is
replaced changes places with it, so that there always is one. An error or Ctrl-C on the way removes all that was made,
parents included; what a killed build left, the next one does. Only an engine is ever replaced, and only if asked.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BuildError
from .manifest import FILE_NAME, sync


def check_destination(out: Path, force: bool) -> None:
    """Raise BuildError unless an engine may be written at `out`. Cheap: call it before the build starts."""
    if out.is_symlink():
        raise BuildError(f"{out} is a symbolic link, which is not replaced; give the directory that it stands for.")
    above = next(path for path in out.absolute().parents if os.path.exists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written" if above.is_dir() else "is not a directory"
        raise BuildError(f"{out} cannot be made ({above} {why}); give `-o` a place that can be written.")
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is not a directory; give `-o` a new directory.")
    if out.is_mount():
        raise BuildError(f"{out} is where a disk is mounted, which cannot be replaced; give `-o` a directory in it.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / FILE_NAME).is_file():
        raise BuildError(f"{out} exists and is not an engine, so it is not replaced; give `-o` a new directory.")
    if not force:
        raise BuildError(f"{out} already holds an engine; pass --force to replace it, or give `-o` a new directory.")


@contextmanager
def engine_directory(out: str | os.PathLike, force: bool = False) -> Iterator[Path]:
    """A temporary folder to fill and `Manifest.save`; it becomes `out` when the block ends without an error.

    Raises BuildError if `out` may not be written (see `check_destination`), cannot be made, or the disk is full.
    """
    out = Path(out).absolute()
    check_destination(out, force)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    made = [p for p in (partial, *partial.parents) if not p.exists()]  # innermost first
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        _remove(made)
        raise BuildError(f"{out} cannot be made ({error.strerror}); give `-o` a place that can be written.") from None
    _remove_abandoned(out, partial)
    lock = lock_folder(partial)
    try:
        yield partial
        if not (partial / FILE_NAME).is_file():
            raise RuntimeError(f"the build ended without a {FILE_NAME}")
        check_destination(out, force)  # whatever came there meanwhile is not ours to replace
        _replace(out, partial)
    except BaseException as error:
        _remove(made)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(f"the disk of {out} is full; free some space or give `-o` another place.") from None
        raise
    finally:
        if lock is not None:
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Locks it for as long as the descriptor is open, or the process lives. None: the file system has no locks.

    Raises BuildError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise BuildError(
                f"{folder} is in use by another process; wait for it or give `-o` another place."
            ) from None
        return None
    return descriptor


def _remove_abandoned(out: Path, ours: Path) -> None:
    """What builds of the same engine left that were killed: nobody has the lock."""
    start = f"{out.name}.partial-"
    with suppress(OSError):  # of another user: none of our business
        for path in out.parent.iterdir():
            if path != ours and path.name.startswith(start) and path.name[len(start) :].isdecimal() and path.is_dir():
                with suppress(BuildError):
                    if (lock := lock_folder(path)) is not None:
                        shutil.rmtree(path, ignore_errors=True)
                        os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change places at once. False: the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace(out: Path, partial: Path) -> None:
    sync(partial)
    if out.exists() and _exchange(out, partial):
        sync(out.parent)
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove(made: list[Path]) -> None:
    """The partial engine with all it holds, then the parents that were made for it, if nothing else is in them."""
    shutil.rmtree(made[0], ignore_errors=True)
    remove_empty(made[1:])


def remove_empty(made: Iterable[Path]) -> None:
    """Folders that were made for something, the innermost first, as far as nothing else is in them."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()
