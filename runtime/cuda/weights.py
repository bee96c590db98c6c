"""Weights from disk to the GPU: threads read into pinned memory while what they read before is copied across."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...engines.weights import WEIGHTS_FILE
from ...plugins.gpu import Gpu

THREADS = 8
PIECE = 16 << 20  # bytes read at a time; a thread has two such buffers
ALIGNMENT = 256


class Piece(NamedTuple):
    """Bytes of the file and where they go."""

    offset: int
    address: int
    size: int


def load_weights(gpu: Gpu, folder: Path, dummy: bool = False) -> tuple[dict[str, int], int]:
    """(address of each weight, bytes of them all). dummy: random numbers in their place, the file is not read."""
    path = folder / WEIGHTS_FILE
    tensors, start = _header(path)
    sizes = {name: end - begin for name, (begin, end) in tensors.items()}
    total = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())
    base = gpu.allocate(total, f"the weights of {folder}")
    addresses, at = {}, base
    for name, size in sizes.items():
        addresses[name] = at
        at += -(-size // ALIGNMENT) * ALIGNMENT
    if dummy:
        _randomise(gpu, base, total)
        return addresses, total
    pieces = [
        Piece(start + begin + offset, addresses[name] + offset, min(PIECE, end - begin - offset))
        for name, (begin, end) in tensors.items()
        for offset in range(0, end - begin, PIECE)
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda i: _read(gpu, path, pieces[i::THREADS]), range(THREADS)))
    return addresses, total


def _header(path: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """({name: (begin, end)} within the data, where the data begins); largest first, as threads share them best."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
    return dict(sorted(places.items(), key=lambda item: item[1][0])), 8 + length


def _read(gpu: Gpu, path: Path, pieces: list[Piece]) -> None:
    gpu.use()
    stream = gpu.stream()
    buffers = [(gpu.pinned(PIECE), gpu.event()) for _ in range(2)]
    file = os.open(path, os.O_RDONLY)
    try:
        for i, piece in enumerate(pieces):
            buffer, copied = buffers[i % 2]
            gpu.wait(copied)
            view, done = buffer[: piece.size].data, 0
            while done < piece.size:
                done += os.preadv(file, [view[done:]], piece.offset + done)
            gpu.upload(piece.address, buffer[: piece.size], stream)
            gpu.record(copied, stream)
        gpu.synchronise(stream)
    finally:
        os.close(file)
        for buffer, _ in buffers:
            gpu.unpin(buffer)


def _randomise(gpu: Gpu, base: int, total: int) -> None:
    """Small random bf16 numbers everywhere (as float32 they are small, too)."""
    buffer = gpu.pinned(PIECE)
    numbers = np.random.default_rng(0).standard_normal(PIECE // 4, np.float32) * 0.02
    buffer[:] = np.repeat((numbers.view(np.uint32) >> 16).astype(np.uint16), 2).view(np.uint8)
    stream = gpu.stream()
    for offset in range(0, total, PIECE):
        gpu.upload(base + offset, buffer[: min(PIECE, total - offset)], stream)
    gpu.synchronise(stream)
    gpu.unpin(buffer)
