"""A large file written once, past the page cache.

A plan is the size of its weights. Through the cache each of its pages is taken, cleared and copied to before the disk
sees it, which took longer than TensorRT's own work (BENCHMARKS.md, "TensorRT for RTX, without a GPU").
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BUFFER_BYTES = 16 << 20  # whole pages, and enough for a disk to be busy with
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """Writes `path` from its beginning with O_DIRECT; through the cache where the file system does not take that.

    Raises OSError from any of its methods, as a file does: the disk is full, or fails.
    """

    def __init__(self, path: Path):
        self._buffer, self._filled = mmap.mmap(-1, BUFFER_BYTES), 0  # direct writes are of whole, aligned blocks
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags, 0o666)

    def write(self, data: bytes) -> int:
        """Takes all of `data`, of any length; what does not fill the buffer waits in it."""
        rest = memoryview(data)
        while len(rest):
            taken = rest[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rest = rest[len(taken) :]
            if self._filled == BUFFER_BYTES:
                self._flush()
        return len(data)

    def _flush(self) -> None:
        with memoryview(self._buffer) as buffer:
            written = 0
            while written < self._filled:
                try:
                    written += os.write(self._file, buffer[written : self._filled])
                except OSError as error:  # some file systems say so only now
                    if error.errno != errno.EINVAL or not self._leave_direct():
                        raise
        self._filled = 0

    def _leave_direct(self) -> bool:
        """From here on through the cache; False if it was so already."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:  # the end is no whole block
                self._leave_direct()
                self._flush()
        finally:
            os.close(self._file)
            self._buffer.close()
