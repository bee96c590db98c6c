"""What must hold of a scheduler after every call: rows and pages are conserved, every request is in one place."""

from ingot.runtime.request import State


def check(scheduler):
    holders = [*scheduler._running, *scheduler._draining]
    scheduler.pool.check([request.pages for request in holders])
    assert sorted([*scheduler._rows, *(r.row for r in holders)]) == list(range(scheduler.max_num_seqs)), "rows"
    assert not any(r.pages or r.row >= 0 for r in scheduler._waiting), "a waiting request holds something"
    for line in (scheduler._running, scheduler._waiting):
        assert line == sorted(line, key=lambda request: request.order), "order"
    preempted = [request for request in scheduler._draining if request.state is State.PREEMPTED]
    places = sorted(request.id for request in (*scheduler._running, *scheduler._waiting, *preempted))
    assert places == sorted(scheduler._requests), "a request is in no place or in two"
