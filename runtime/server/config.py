"""What `ingot serve` can be told; the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...engines.errors import EngineError, shown
from .tracing import wanted


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the API is served. Times are seconds, None is without end. Raises EngineError for a value that cannot work.

    served_model_name: what clients call the model, by default the folder's name. api_keys: any of them is accepted as
    `Authorization: Bearer KEY`; none: everybody is. max_waiting, max_waiting_tokens: requests and prompt tokens that
    may wait for a place in the batch; past them clients get 429. request_timeout: from arrival to the last token;
    queue_timeout: to the first. drain_timeout: how long open requests may go on after SIGTERM. watchdog: a step that
    takes longer means that the engine hangs. stream_pause: how long the next words of a stream may wait for more where
    many streams are open, so that their events do not take the processor from the engine; 0: not at all. otlp_endpoint:
    base URL of the collector that gets a span per request; log_level and log_format: those of logs.py, which whoever
    starts a process sets up.
    """

    engine: Path
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_waiting: int = 1024
    max_waiting_tokens: int = 1 << 20
    max_body_bytes: int = 8 << 20
    max_n: int = 16
    request_timeout: float | None = None
    queue_timeout: float | None = None
    drain_timeout: float = 30.0
    watchdog: float = 60.0
    stream_pause: float = 0.05
    otlp_endpoint: str | None = None
    log_level: str = "warning"
    log_format: str = "text"

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_waiting_tokens", "max_body_bytes", "max_n"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {shown(getattr(self, name))}; it must be at least 1.")
        for name in ("request_timeout", "queue_timeout", "watchdog"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EngineError(f"{name} is {shown(value)}; it must be above 0 seconds.")
        if not 0 <= self.port <= 65535:
            raise EngineError(f"port is {shown(self.port)}; it must be 0 to 65535.")
        for name in ("drain_timeout", "stream_pause"):
            if not getattr(self, name) >= 0:
                raise EngineError(f"{name} is {shown(getattr(self, name))}; it must be 0 seconds or more.")
        if not all(key and key == key.strip() for key in self.api_keys):  # an unset variable would let everybody in
            raise EngineError("An API key is empty, or has blanks around it; give none at all to serve everybody.")
        wanted(self.otlp_endpoint)

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.engine.resolve().name
