"""How the engine process writes while many streams are open: beginnings and ends at once, the rest together."""

import socket
import threading
import time

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
        news = answers(ours, 6, 100)
        found = sizes(news)
    took = news[-1][0]
    for pieces in found.values():
        assert sum(pieces) == 100 and pieces[0] < 20  # the first word did not wait
        assert len(pieces) <= 3 + took / PAUSE
    gaps = [after - before for (before, _), (after, _) in zip(news, news[1:], strict=False)]
    assert max(gaps) < 3 * PAUSE


def test_no_pause_where_few_are_open_or_none_is_wanted(session):
    with connection(session, 0.0, "2") as ours:
        assert all(sum(pieces) == 40 and len(pieces) > 10 for pieces in sizes(answers(ours, 4, 40)).values())
    with connection(session, PAUSE, "3") as ours:  # one stream: a pause of 0.5 ms, less than a step
        assert all(sum(pieces) == 40 and len(pieces) > 10 for pieces in sizes(answers(ours, 1, 40)).values())


def test_who_leaves_takes_only_its_own_requests(session):
    endless = {"max_tokens": 3000, "temperature": 0, "ignore_eos": True}
    one, other = connection(session, 0.0, "4"), connection(session, 0.0, "5")
    with other:
        one.sendall(frame(Submit(1, [5, 6], endless, 0, time.monotonic())))
        deadline = time.monotonic() + 20
        while session.metrics().running != 1:
            assert time.monotonic() < deadline
        other.sendall(frame(Submit(1, [5, 7], endless, 0, time.monotonic())))  # the same number is another request
        while session.metrics().running != 2:
            assert time.monotonic() < deadline
        one.close()
        while session.metrics().running != 1:
            assert time.monotonic() < deadline
        aborted = session.metrics().finished["abort"]
    while session.metrics().running:
        assert time.monotonic() < deadline
    assert session.metrics().finished["abort"] == aborted + 1
