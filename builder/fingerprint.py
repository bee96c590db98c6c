"""What makes a model itself, in one hash: so that numbers found for it are not used with another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

SAMPLES, LENGTH = 4, 4096  # places of a tensor that are read, bytes of each


def fingerprint(checkpoint: Checkpoint) -> str:
    """Of the names, types and shapes of all tensors, and of some bytes of each from its first to its last.

    Not of all bytes, which would take as long as reading them; training changes every tensor everywhere.
    """
    found = hashlib.sha256()
    files: dict[Path, BinaryIO] = {}
    try:
        for name, stored in sorted(checkpoint.stored.items()):
            found.update(f"{name} {stored.dtype.name} {stored.shape}|".encode())
            file = files.get(stored.file) or files.setdefault(stored.file, stored.file.open("rb"))
            last = max(stored.length - LENGTH, 0)
            for i in range(SAMPLES):
                file.seek(stored.offset + last * i // (SAMPLES - 1))
                found.update(file.read(min(LENGTH, stored.length)))
    finally:
        for file in files.values():
            file.close()
    return found.hexdigest()
