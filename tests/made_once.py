"""What the workers of a run share: made by the one that asks first, while the others wait for it."""

import fcntl


def made_once(out, make):
    """The path `out` after `make(out)`, which runs unless it is there; `out` lies in conftest's folder `shared`."""
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            make(out)
    return out
