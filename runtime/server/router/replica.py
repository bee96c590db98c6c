"""One replica's process: `ingot serve`, told what to do on its standard input.

A JSON line holds the same settings that the router's process got; on the command line, API keys would be seen by all
users of the machine. Invariant: the end of the input means that the router is gone, however it went, and drains this
server as SIGTERM does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from ....engines.errors import EngineError
from ..config import ServerConfig
from ..logs import set_up

FAILED = 3  # exit code of an engine that cannot be served, as the command line's


class Setting(msgspec.Struct):
    """What a replica is told. options: of the engine, as `LLM` takes them; name: what it is called in the log."""

    config: ServerConfig
    options: dict[str, Any]
    name: str

    def encode(self) -> bytes:
        """As one line."""
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Setting:
        """Raises msgspec.ValidationError."""
        return msgspec.json.decode(line, type=cls, dec_hook=lambda kind, value: Path(value))


def _stop_with_router() -> None:
    while os.read(0, 4096):  # not by sys.stdin, which an exit could not close while it is being read
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Serve until told to stop. Returns the exit code."""
    setting = Setting.decode(sys.stdin.buffer.readline())
    set_up(setting.config.log_level, setting.config.log_format, setting.name)
    from ..main import serve

    threading.Thread(target=_stop_with_router, name="ingot-router-gone", daemon=True).start()
    try:
        asyncio.run(serve(setting.config, setting.options, print_ready=False))
    except EngineError as error:
        print(f"error: {setting.name}: {str(error).rstrip('.')}.", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
