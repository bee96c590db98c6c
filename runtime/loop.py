"""The serving loop: step n is launched before step n - 1 is committed, so the host's work hides behind the device's.

Everything that touches the scheduler happens in this thread: other threads put orders (plain calls) into the inbox, and
deltas leave through `deliver`. No feature has a branch here; it is a sampling column, a step producer or an order.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import nvtx

from .batch import Arena
from .executor import Executor, Sampled
from .scheduler import Scheduler
from .step import Delta, Step

Order = Callable[[], None]
Inbox = SimpleQueue["Order | None"]  # None: stop after what is in flight


def run(
    scheduler: Scheduler, arena: Arena, executor: Executor, inbox: Inbox, deliver: Callable[[list[Delta]], None]
) -> None:
    """Serve until told to stop. Raises what a step, an order or `deliver` raises; nothing is committed after that."""
    previous: tuple[Step, Sampled] | None = None
    while take(inbox, idle=previous is None and not scheduler.has_work):
        with nvtx.annotate("schedule"):
            step = scheduler.schedule()
        now = None
        if step:
            with nvtx.annotate("fill"):
                batch = arena.fill(step)
            with nvtx.annotate("launch"):
                now = step, executor.launch(batch)
        if previous:
            result = previous[1].wait()
            with nvtx.annotate("commit"):
                deliver(scheduler.commit(previous[0], *result))
        elif now is None and scheduler.has_work:
            raise RuntimeError("the scheduler has requests, but schedules nothing with no step in flight")
        previous = now


def take(inbox: Inbox, idle: bool) -> bool:
    """Carry out the orders that have come, waiting for one if there is nothing else to do. False: stop."""
    while idle or not inbox.empty():
        order = inbox.get()
        if order is None:
            return False
        order()
        idle = False
    return True
