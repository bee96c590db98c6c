"""The engine process: `python -m ingot.runtime.server.child SOCKET SETTING`, started by supervisor.py alone.

SOCKET is the number of an inherited socket, SETTING a JSON object: `engine`, the folder; `options`, its ServeConfig's;
`longest_pause` of a stream, or 0; `listener`, the number of a socket where API processes may connect, or none.
The end of SOCKET closes with the process that started this one: whatever this one is doing, it exits then, and the GPU
is free. An API process that goes takes its requests with it, and nothing else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import json
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence

from ...engines.errors import EngineError
from ..capacity import ServeConfig
from ..session import Session
from .channel import Failed
from .service import BROKEN, Service

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Linux kills this process with its parent, even where a stuck thread keeps Python from reading the socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _inherited(number: int) -> socket.socket:
    sock = socket.socket(fileno=number)
    sock.set_inheritable(False)
    return sock


def _accept(listener: socket.socket, session: Session, longest_pause: float) -> None:
    """Serve whoever connects, each in threads of its own."""
    for number in itertools.count(1):
        sock, _ = listener.accept()
        service = Service(sock, longest_pause, str(number), main=False)
        for work in (service.listen, lambda service=service: service.serve(session)):
            threading.Thread(target=work, name=f"ingot-api-{number}", daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Open the engine and serve it. Returns the exit code: 0 when told to close, else BROKEN."""
    number, setting = arguments
    _die_with_parent()
    faulthandler.enable()
    for name in (signal.SIGINT, signal.SIGTERM):  # they are meant for the API, which may still drain
        signal.signal(name, signal.SIG_IGN)
    given = json.loads(setting)
    service = Service(_inherited(int(number)), longest_pause := given.get("longest_pause", 0.0))
    threading.Thread(target=service.listen, name="ingot-listen", daemon=True).start()
    try:
        session = Session(given["engine"], ServeConfig(**given["options"]))
        session.engine.default_params()  # the API begins with them
    except Exception as error:
        known = isinstance(error, EngineError)
        if not known:
            traceback.print_exc()
        service.send(Failed(str(error) if known else f"The engine cannot be opened ({type(error).__name__}: {error})."))
        return BROKEN
    if (listener := given.get("listener")) is not None:
        clients = _inherited(listener), session, longest_pause
        threading.Thread(target=_accept, args=clients, name="ingot-accept", daemon=True).start()
    return service.serve(session)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
