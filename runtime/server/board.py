"""Numbers that the API processes of one server share: what each has open, and what it has counted for the metrics.

They lie in memory that all of them have mapped. Each process writes its own slot and reads all: nothing is asked and
nothing waited for, and what a process that died had counted is still there. Only who decides on the sum of all (is
there room for one more?) must have the lock, which the kernel takes back from a process that dies.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

SIZE = 256  # numbers in a slot
SEQUENCES_OPEN, TOKENS_WAITING = 0, 1  # admission.py; the metrics have the others
NUM_RESERVED = 2
_BYTES = 8 * SIZE


class Slot:
    """One process's numbers, among those of all. Of a server with one process, the only one."""

    def __init__(self, file: int | None = None, index: int = 0, num_slots: int = 1):
        self._file = file
        memory = bytearray(_BYTES) if file is None else mmap.mmap(file, num_slots * _BYTES)
        numbers = memoryview(memory).cast("d")
        self._slots = [numbers[i * SIZE : (i + 1) * SIZE] for i in range(num_slots)]
        self.own = self._slots[index]
        self._num_taken = NUM_RESERVED

    def total(self, number: int) -> float:
        """The sum of all processes' numbers at this place."""
        return sum(slot[number] for slot in self._slots)

    def take(self, count: int) -> int:
        """Where so many places begin that nobody has. All processes must ask for the same in the same order."""
        begin = self._num_taken
        self._num_taken += count
        if self._num_taken > SIZE:
            raise ValueError(f"a slot has {SIZE} numbers, {self._num_taken} are asked for")
        return begin

    @contextmanager
    def lock(self) -> Iterator[None]:
        """No other process has it meanwhile. To be held for microseconds: it blocks the event loop."""
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def vacate(self, index: int) -> None:
        """What the process of another slot had open is open no more: it is gone."""
        self._slots[index][SEQUENCES_OPEN] = self._slots[index][TOKENS_WAITING] = 0.0


def board(num_slots: int) -> int:
    """A file for so many slots, all zeros; to be inherited by number, and mapped by `Slot`."""
    with tempfile.TemporaryFile() as file:
        file.truncate(num_slots * _BYTES)
        return os.dup(file.fileno())
