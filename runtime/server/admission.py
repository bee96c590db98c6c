"""Who gets in: a bound on what may wait, so that a client hears at once that there is no room, and not after minutes.

What is open is counted here, in the API's own processes: what the engine says of itself is a moment old. Where there
are several, the limits hold for all of them together. A request's tokens count as waiting until its first token is
there. Invariant: everything admitted is given back, whatever happens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ...engines.errors import RequestError
from .board import SEQUENCES_OPEN, TOKENS_WAITING, Slot
from .errors import Refused
from .logs import fields

LONGEST_RETRY = 60  # seconds
log = logging.getLogger("ingot.server")


@dataclass
class Ticket:
    """An admitted request. `started` is to be called when its first token is there; a second call does nothing."""

    slot: Slot
    num_tokens: int
    num_sequences: int
    began: float

    def started(self) -> None:
        self.slot.own[TOKENS_WAITING] -= self.num_tokens
        self.num_tokens = 0


class Admission:
    """Counts open requests against the limits. To be used in one event loop.

    max_running: sequences that the engine decodes at a time; max_waiting: sequences that may wait besides;
    max_waiting_tokens: prompt tokens of requests without a first token. slot: this process's among those of a server.
    """

    def __init__(self, max_running: int, max_waiting: int, max_waiting_tokens: int, slot: Slot | None = None):
        self._max_open, self._max_running = max_running + max_waiting, max_running
        self._max_waiting_tokens = max_waiting_tokens
        self._slot = slot or Slot()
        self.accepting = True
        self._seconds = 1.0  # of a request, moving average
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def sequences_open(self) -> int:
        """In this process."""
        return int(self._slot.own[SEQUENCES_OPEN])

    @property
    def tokens_waiting(self) -> int:
        """In this process."""
        return int(self._slot.own[TOKENS_WAITING])

    @asynccontextmanager
    async def admit(self, num_tokens: int, num_sequences: int = 1) -> AsyncIterator[Ticket]:
        """A place for the time of a `with` block.

        Raises Refused: 503 while draining, 429 where there is no room; RequestError: there never is.
        """
        if not self.accepting:
            raise Refused(503, "The server is shutting down; send the request to another one.", self.retry_after)
        if num_sequences > self._max_open:
            raise RequestError(
                f"The request asks for {num_sequences} answers; this server takes {self._max_open}; send several."
            )
        with self._slot.lock():
            self._check_room(num_tokens, num_sequences)
            self._slot.own[SEQUENCES_OPEN] += num_sequences
            self._slot.own[TOKENS_WAITING] += num_tokens
        ticket = Ticket(self._slot, num_tokens, num_sequences, time.monotonic())
        self._empty.clear()
        try:
            yield ticket
        finally:
            ticket.started()
            self._slot.own[SEQUENCES_OPEN] -= num_sequences
            self._seconds += 0.1 * (time.monotonic() - ticket.began - self._seconds)
            if not self.sequences_open:
                self._empty.set()

    def _check_room(self, num_tokens: int, num_sequences: int) -> None:
        num_open, num_waiting = (int(self._slot.total(number)) for number in (SEQUENCES_OPEN, TOKENS_WAITING))
        full = num_open + num_sequences > self._max_open
        # a prompt of more tokens than may wait is served when nothing else waits
        long = num_waiting and num_waiting + num_tokens > self._max_waiting_tokens
        if full or long:
            what = f"{num_open} sequences are open" if full else f"{num_waiting} tokens are waiting"
            limit = f"{self._max_open} sequences" if full else f"{self._max_waiting_tokens} waiting tokens"
            raise Refused(429, f"The server is full: {what}, the limit is {limit}; try again later.", self.retry_after)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room: what is ahead of a newcomer, by what the engine serves at a time."""
        rounds = max(1.0, self._slot.total(SEQUENCES_OPEN) / self._max_running)
        return max(1, min(LONGEST_RETRY, round(rounds * self._seconds)))

    async def drain(self, timeout: float) -> bool:
        """Admits nobody from now on; True when all open requests have ended within `timeout` seconds."""
        self.accepting = False
        began, num_open = time.monotonic(), self.sequences_open
        log.info("draining for at most %g s", timeout, extra=fields("draining", open=num_open))
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except TimeoutError:
            what = fields("drain_timeout", open=self.sequences_open)
            log.warning("not drained after %g s: what is still open is aborted", timeout, extra=what)
            return False
        log.info("drained", extra=fields("drained", seconds=round(time.monotonic() - began, 3), ended=num_open))
        return True
