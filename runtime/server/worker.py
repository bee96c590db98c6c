"""One of several API processes of a server: `python -m ingot.runtime.server.worker`, started by workers.py alone.

Its standard input brings a line with the setting, then a line whenever the engine's state changes. It answers with a
line once it serves. Invariant: the end of the input means that its parent is gone, and drains it as SIGTERM does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from ...engines.errors import EngineError
from .board import Slot
from .config import ServerConfig
from .link import SharedEngine
from .logs import set_up
from .main import serve_api

FAILED = 3  # exit code of one that could not serve
_LONGEST = 1 << 20  # bytes of a line


class Setting(msgspec.Struct):
    """What a worker is told. path: of the engine's socket; listener, board: numbers of files that it inherits."""

    config: ServerConfig
    path: str
    listener: int
    board: int
    index: int
    num_workers: int

    def encode(self) -> bytes:
        """As one line."""
        return msgspec.json.encode(self, enc_hook=str) + b"\n"


class State(msgspec.Struct):
    """How the engine process is doing. down: why there is none, or empty."""

    down: str
    gave_up: bool

    def encode(self) -> bytes:
        """As one line."""
        return msgspec.json.encode(self) + b"\n"


async def _serve() -> None:
    lines = asyncio.StreamReader(_LONGEST)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    told = msgspec.json.decode(await lines.readline(), type=Setting, dec_hook=lambda kind, value: Path(value))
    config, name = told.config, f"worker {told.index}"
    set_up(config.log_level, config.log_format, name)
    with socket.socket(fileno=told.listener) as listener:
        engine = SharedEngine(config.engine, told.path)
        async with engine:
            following = asyncio.create_task(_follow(lines, engine))
            try:
                slot = Slot(told.board, told.index, told.num_workers)
                await serve_api(config, engine, listener, lambda: print("serves", flush=True), slot)
            finally:
                following.cancel()


async def _follow(lines: asyncio.StreamReader, engine: SharedEngine) -> None:
    while line := await lines.readline():
        state = msgspec.json.decode(line, type=State)
        engine.told(state.down, state.gave_up)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Serve until told to stop. Returns the exit code."""
    try:
        asyncio.run(_serve())
    except EngineError as error:
        print(f"error: {str(error).rstrip('.')}.", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
