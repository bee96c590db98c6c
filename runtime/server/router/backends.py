"""The servers behind the router, what is known of each, and which one gets a request. No sockets, no clock, no locks.

A server's work is counted here: what was sent there and has not ended. A request goes to the one with the least work,
less what it need not compute there because its beginning is known, which counts for `margin` sequences at most.
Invariant: the chosen server is ready, and its work is within the margin of the least among those it was chosen from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

from .prefix import BLOCK, BYTES_PER_TOKEN, Demand, PrefixMemory

# Reading a prompt of that many tokens is taken to cost what decoding a sequence does: a few hundred steps at a share of
# the batch each. An estimate; only the balance between long prompts and many short ones hangs on it.
TOKENS_PER_SEQUENCE = 512
FULL_FOR = 1.0  # seconds that a server which had no room is avoided, unless it takes a request before


@dataclass
class Counts:
    """What became of the requests sent to a server."""

    requests: int = 0
    by_prefix: int = 0  # it had seen their beginning
    refused: int = 0  # 429 and 503
    errors: int = 0  # connections that failed or broke
    retries: int = 0  # requests that went on to another server


@dataclass(eq=False)
class Backend:
    """A server. `ready` is what its last check said; `silent`: it has not answered any for long; `elsewhere`:
    sequences that somebody else has open there."""

    url: str
    ready: bool = False
    silent: bool = False
    num_open: int = 0  # requests
    num_sequences: int = 0
    num_tokens: int = 0  # of prompts of open requests
    elsewhere: float = 0.0
    full_until: float = 0.0
    retry_after: int | None = None  # seconds, as it last said
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)
    counts: Counts = field(default_factory=Counts)

    @property
    def work(self) -> float:
        """In sequences."""
        return self.num_sequences + self.elsewhere + self.num_tokens / TOKENS_PER_SEQUENCE

    def lose(self) -> None:
        """It is not ready, and what it knew is taken for lost."""
        self.ready = False
        self.elsewhere = 0.0
        self.prefixes.clear()

    def refuse(self, now: float, retry_after: int | None) -> None:
        """It said that it has no room."""
        self.full_until, self.retry_after = now + FULL_FOR, retry_after

    def take(self) -> None:
        """It took a request, so there was room."""
        self.full_until = 0.0


class Fleet:
    """All servers. margin: sequences, see above."""

    def __init__(self, backends: Sequence[Backend], margin: float):
        self.backends, self._margin = tuple(backends), margin

    @property
    def num_ready(self) -> int:
        return sum(backend.ready for backend in self.backends)

    def choose(self, demand: Demand, now: float, tried: Collection[Backend] = ()) -> Backend | None:
        """The server for a request; after a first try only one that may have room. None: there is none.

        Where work and prefix say nothing, rendezvous hashing of the prompt's beginning does, so that prompts that
        begin alike meet, also from several routers and after a restart of one.
        """
        ready = [backend for backend in self.backends if backend.ready and backend not in tried]
        with_room = [backend for backend in ready if backend.full_until <= now]
        candidates = with_room if with_room or tried else ready

        def preference(backend: Backend) -> tuple[float, int, bytes]:
            known = backend.prefixes.match(demand.prefix)
            saving = known * BLOCK / BYTES_PER_TOKEN / TOKENS_PER_SEQUENCE
            draw = blake2b(backend.url.encode(), key=blake2b(demand.key, digest_size=16).digest(), digest_size=8)
            return backend.work - min(self._margin, saving), -known, draw.digest()

        return min(candidates, key=preference, default=None)

    @contextmanager
    def sent(self, backend: Backend, demand: Demand) -> Iterator[None]:
        """Counts a request to a server for the time of a `with` block."""
        backend.counts.requests += 1
        backend.counts.by_prefix += backend.prefixes.match(demand.prefix) > 0
        backend.prefixes.record(demand.prefix)
        backend.num_open += 1
        backend.num_sequences += demand.num_sequences
        backend.num_tokens += demand.num_tokens
        try:
            yield
        finally:
            backend.num_open -= 1
            backend.num_sequences -= demand.num_sequences
            backend.num_tokens -= demand.num_tokens

    def soonest(self, now: float) -> int | None:
        """The smallest Retry-After of those that are full, None if none of them told."""
        told = [backend.retry_after for backend in self.backends if backend.full_until > now]
        return min((seconds for seconds in told if seconds is not None), default=None)
