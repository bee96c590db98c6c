"""The hash of a file: sha256 over the sha256 of its 64 MiB chunks, in order.

Chunks are hashed on threads (hashlib releases the GIL), so that a 16 GB engine is verified in seconds.
The hash depends on the bytes alone: not on names, times, or the number of threads.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 64 << 20
_READ_BYTES = 1 << 20  # stays in the second-level cache between the read and the hash


def _chunk_digest(path: Path, start: int) -> bytes:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    left = CHUNK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (n := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:n])
            left -= n
    return digest.digest()


def tree_hashes(paths: Mapping[str, Path], progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Hex hash of every file, all chunks of all files on one pool of threads.

    `progress(done, total)` is called in bytes after each chunk. Raises OSError for a file that cannot be read.
    """
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    total, done = sum(sizes.values()), 0
    hashes = {}
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        chunks = {
            name: [threads.submit(_chunk_digest, path, start) for start in range(0, sizes[name], CHUNK_BYTES)]
            for name, path in paths.items()
        }
        for name, futures in chunks.items():
            digests = []
            for i, future in enumerate(futures):
                digests.append(future.result())
                done += min(CHUNK_BYTES, sizes[name] - i * CHUNK_BYTES)
                if progress:
                    progress(done, total)
            hashes[name] = root(digests)
    return hashes


def root(digests: Iterable[bytes]) -> str:
    """The hash of a file in hex, from the sha256 of its chunks in order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
