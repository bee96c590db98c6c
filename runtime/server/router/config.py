"""What the router can be told; `ingot route` is made from it, and `ingot serve --replicas` fills it in."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ....engines.errors import EngineError
from ..tracing import wanted


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How requests are spread. Times are seconds. Raises EngineError for a value that cannot work.

    backends: base URLs of servers. max_open: requests open at a time, past them clients get 429. margin: by how many
    sequences a server may be busier than the idlest and still be chosen for a prefix that it holds. check_interval:
    between two looks at `/ready`; check_timeout: how long one may take. silence: after that long without an answer to
    any look, what is open there is given up. follow_load: also count what others have sent there, as `/metrics` of the
    servers tells. drain_timeout: how long open requests may go on after SIGTERM. otlp_endpoint: as `ServerConfig` has.
    """

    backends: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    max_open: int = 16384
    max_body_bytes: int = 8 << 20
    margin: float = 4.0
    check_interval: float = 0.5
    check_timeout: float = 5.0
    connect_timeout: float = 2.0
    silence: float = 10.0
    follow_load: bool = False
    drain_timeout: float = 30.0
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.backends:
            raise EngineError("There is no server to route to; give the address of one.")
        for url in self.backends:
            check_url(url)
        if len(set(self.backends)) < len(self.backends):
            raise EngineError("The same server is given twice; give each address once.")
        for name in ("max_open", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("check_interval", "check_timeout", "connect_timeout", "silence"):
            if not getattr(self, name) > 0:
                raise EngineError(f"{name} is {getattr(self, name):g}; it must be above 0 seconds.")
        for name in ("margin", "drain_timeout"):
            if not getattr(self, name) >= 0:
                raise EngineError(f"{name} is {getattr(self, name):g}; it must be 0 or more.")
        if not 0 <= self.port <= 65535:
            raise EngineError(f"port is {self.port}; it must be 0 to 65535.")
        wanted(self.otlp_endpoint)


def url_of(address: str) -> str:
    """The base URL that a user means by `host:port` or by a URL."""
    return (address if "://" in address else f"http://{address}").rstrip("/")


def check_url(url: str) -> None:
    """Raises EngineError for what is not the base URL of a server."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        right = bool(host) and parts.scheme in ("http", "https") and parts.username is None and parts.port != 0
        right = right and not parts.query and not parts.fragment
    except ValueError:
        right = False
    if not right:
        raise EngineError(f"{url} is not the address of a server; write it as host:port or http://host:port.")
