"""Weights from disk to the GPU: threads read into pinned memory while what they read before is copied across.

Addresses are known at once, so that the plan is prepared meanwhile. The bytes that are copied are hashed on their way,
so that verifying costs no second reading. Behind `wait` every weight is there, and the hash of the file is right.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from ...engines.errors import EngineError
from ...engines.tree_hash import CHUNK_BYTES, root
from ...engines.weights import WEIGHTS_FILE, declared_weights, load_graph
from ...plugins.gpu import Gpu
from ..engine import Engine

THREADS = min(16, os.cpu_count() or 1)
PIECE = 8 << 20  # bytes read at a time; a thread has two such buffers
ALIGNMENT = 256


class Place(NamedTuple):
    """A weight: bytes `begin` to `end` of the file belong at `address`."""

    begin: int
    end: int
    address: int


class Weights:
    """The weights of an engine in one region of the GPU, on their way from the moment this exists.

    addresses: by name; num_bytes: of the region. Leaving it as a context waits for them, or stops them on an error.
    dummy: small random numbers in their place, zeros for what may be an index; the file is not needed.
    Raises EngineError: too little memory, a missing or truncated file.
    """

    def __init__(self, gpu: Gpu, engine: Engine, dummy: bool = False):
        self._gpu, self._engine, self._path = gpu, engine, engine.folder / WEIGHTS_FILE
        if dummy:
            declared = declared_weights(load_graph(engine.folder))
            sizes = {name: dtype.itemsize * int(np.prod(shape, dtype=np.int64))
                     for name, (dtype, shape) in declared.items()}  # fmt: skip
        else:
            engine.manifest.check_size(engine.folder, WEIGHTS_FILE)
            spans = _spans(self._path)
            sizes = {name: end - begin for name, (begin, end) in spans.items()}
        self.num_bytes = sum(_aligned(size) for size in sizes.values())
        base = at = gpu.allocate(self.num_bytes, f"the weights of {engine.folder}")
        self.addresses: dict[str, int] = {}
        for name, size in sizes.items():
            self.addresses[name] = at
            at += _aligned(size)
        if dummy:
            _randomise(gpu, [(base, self.num_bytes)])
            for special in {dtype for dtype, _ in declared.values() if dtype.name.startswith("float8")}:
                # bytes of other types may be NaN
                places = [(self.addresses[n], sizes[n]) for n, (dtype, _) in declared.items() if dtype is special]
                _randomise(gpu, places, special.numpy)
            for name, (dtype, _) in declared.items():
                if not dtype.floating and dtype.itemsize > 1:  # single bytes are quantised weights
                    _zero(gpu, self.addresses[name], sizes[name])
            self._readers = []
            return
        self._places = sorted(Place(begin, end, self.addresses[name]) for name, (begin, end) in spans.items())
        self._begins = [place.begin for place in self._places]
        self._size = self._path.stat().st_size
        self._digests = [b""] * -(-self._size // CHUNK_BYTES)
        self._numbers = itertools.count()  # of chunks; shared by the threads
        self._stopped = False
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ingot-weights")
        self._readers = [threads.submit(self._read) for _ in range(THREADS)]
        threads.shutdown(wait=False)

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # an error that is nobody's sentence may come of a damaged file, which is known at its end
        self._stopped = error is not None and (isinstance(error, EngineError) or not isinstance(error, Exception))
        try:
            self.wait()
        except Exception:
            if not self._stopped:
                raise

    def wait(self) -> None:
        """Returns when all threads are done. Raises what one of them raised, or EngineError: the file is damaged."""
        if not self._readers:
            return
        errors = [error for reader in self._readers if (error := reader.exception())]
        if errors:
            raise errors[0]
        if not self._stopped:
            self._engine.manifest.check_hash(self._engine.folder, WEIGHTS_FILE, root(self._digests))

    def _read(self) -> None:
        """Copies and hashes chunks of the file until there is none left."""
        try:
            self._gpu.use()
            stream = self._gpu.stream()
            with self._path.open("rb", buffering=0) as file:
                buffers = itertools.cycle([(self._gpu.pinned(PIECE), self._gpu.event()) for _ in range(2)])
                while not self._stopped and (number := next(self._numbers)) < len(self._digests):
                    begin = number * CHUNK_BYTES
                    end = min(begin + CHUNK_BYTES, self._size)
                    digest = hashlib.sha256()
                    for offset in range(begin, end, PIECE):
                        buffer, copied = next(buffers)
                        self._gpu.wait(copied)
                        piece = buffer[: min(PIECE, end - offset)]
                        _fill(piece, file.fileno(), offset)
                        for low, high, address in self._overlaps(offset, offset + len(piece)):
                            self._gpu.upload(address, piece[low - offset : high - offset], stream)
                        self._gpu.record(copied, stream)
                        digest.update(piece.data)
                    self._digests[number] = digest.digest()
                self._gpu.synchronise(stream)
            for buffer, _ in (next(buffers) for _ in range(2)):
                self._gpu.unpin(buffer)
        except OSError as error:
            self._stopped = True
            raise EngineError(f"{self._path} cannot be read ({error.strerror}); see to the disk.") from None
        except BaseException:
            self._stopped = True
            raise

    def _overlaps(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first byte, last byte + 1, address) of what belongs to weights among bytes `begin` to `end` of the file."""
        for place in itertools.islice(self._places, max(0, bisect_right(self._begins, begin) - 1), None):
            if place.begin >= end:
                return
            low, high = max(begin, place.begin), min(end, place.end)
            if low < high:
                yield low, high, place.address + low - place.begin


def _spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each weight lies in the file, (first byte, last byte + 1)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            places = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            if not all(0 <= begin <= end <= path.stat().st_size - start for begin, end in places.values()):
                raise ValueError
            return {name: (start + begin, start + end) for name, (begin, end) in places.items()}
        except (ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
            raise EngineError(f"{path} is damaged (its header cannot be read); build the engine again.") from None


def _fill(buffer: np.ndarray, file: int, offset: int) -> None:
    """Fills the buffer from the file. Raises OSError: the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:].data], offset + done)
        if not count:
            raise OSError(0, "it ends early")
        done += count


def _randomise(gpu: Gpu, spans: Sequence[tuple[int, int]], dtype: np.dtype | None = None) -> None:
    """Small random bf16 numbers everywhere (as float32 they are small, too), or numbers about 1 of a dtype.

    spans: (address, bytes) each.
    """
    buffer, stream = gpu.pinned(PIECE), gpu.stream()
    count = PIECE // (dtype.itemsize if dtype else 2)
    numbers = np.random.default_rng(0).standard_normal(count, np.float32)
    if dtype is not None:
        buffer[:] = numbers.astype(dtype).view(np.uint8)
    else:
        buffer[:] = ((numbers * 0.02).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    for base, total in spans:
        for offset in range(0, total, PIECE):
            gpu.upload(base + offset, buffer[: min(PIECE, total - offset)], stream)
    gpu.synchronise(stream)
    gpu.unpin(buffer)


def _zero(gpu: Gpu, address: int, num_bytes: int) -> None:
    stream = gpu.stream()
    gpu.fill(address, num_bytes, 0, stream)
    gpu.synchronise(stream)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
