"""How the engine process writes while many streams are open: beginnings and ends at once, the rest together."""

import socket
import threading
import time
from itertools import pairwise

import pytest
from ingot.runtime.capacity import ServeConfig
from ingot.runtime.server import service
from ingot.runtime.server.channel import Frames, FromEngine, News, Ready, Submit, frame
from ingot.runtime.session import Session

PAUSE = 0.3  # seconds


@pytest.fixture(scope="module")
def session(demo_engine):
    session = Session(demo_engine, ServeConfig())
    yield session
    session.close()


def connection(session, longest_pause, name):
    ours, theirs = socket.socketpair()
    served = service.Service(theirs, longest_pause, name, main=False)
    for work in (served.listen, lambda: served.serve(session)):
        threading.Thread(target=work, daemon=True).start()
    return ours


def answers(ours, num_streams, num_tokens):
    """[(when, updates)] of all news until all have ended; when: seconds since they were asked for."""
    begun = time.monotonic()
    params = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    for number in range(num_streams):
        ours.sendall(frame(Submit(number, [5, 6, 7 + number], params, 0, begun)))
    frames, news, ended = Frames(FromEngine), [], 0
    while ended < num_streams:
        for message in frames.feed(ours.recv(1 << 16)):
            assert isinstance(message, News | Ready), message
            if isinstance(message, News):
                news.append((time.monotonic() - begun, message.updates))
                ended += sum(part.finish_reason is not None for update in message.updates for part in update.parts)
    return news


def sizes(news):
    """Tokens of each update, by stream."""
    found = {}
    for _, updates in news:
        for update in updates:
            found.setdefault(update.number, []).append(sum(len(part.token_ids) for part in update.parts))
    return found


def test_words_wait_for_more_where_events_would_cost_too_much(session, monkeypatch):
    monkeypatch.setattr(service, "EVENT", 1.0)  # seconds: any stream is too much, so each pause is the longest
    with connection(session, PAUSE, "1") as ours:
        news = answers(ours, 6, 600)
        found = sizes(news)
    took = news[-1][0]
    for pieces in found.values():
        assert sum(pieces) == 600 and pieces[0] < 20  # the first word did not wait
        assert len(pieces) <= 3 + took / PAUSE
    for (before, _), this in pairwise(news):
        # a machine that stood still for long has made few words meanwhile
        most = max(pieces[0] for pieces in sizes([this]).values())
        assert min(this[0] - before, most * took / 600) < 3 * PAUSE


def test_no_pause_where_few_are_open_or_none_is_wanted(session):
    # one stream: a pause of 0.5 ms, less than a step
    for pause, num_streams, name in ((0.0, 4, "2"), (PAUSE, 1, "3")):
        with connection(session, pause, name) as ours:
            news = answers(ours, num_streams, 200)
        most = 3 + news[-1][0] / PAUSE  # pieces, if they waited
        assert all(sum(pieces) == 200 and len(pieces) > 2 * most for pieces in sizes(news).values())


def test_who_leaves_takes_only_its_own_requests(session):
    endless = {"max_tokens": 3000, "temperature": 0, "ignore_eos": True}
    one, other = connection(session, 0.0, "4"), connection(session, 0.0, "5")

    def until(running, aborted):
        deadline = time.monotonic() + 60
        while (found := session.metrics()).running != running or found.finished.get("abort", 0) != aborted:
            assert time.monotonic() < deadline, found
            time.sleep(0.005)

    before = session.metrics().finished.get("abort", 0)
    with other:
        one.sendall(frame(Submit(1, [5, 6], endless, 0, time.monotonic())))
        until(1, before)
        other.sendall(frame(Submit(1, [5, 7], endless, 0, time.monotonic())))  # the same number is another request
        until(2, before)
        one.close()
        until(1, before + 1)
    until(0, before + 2)
