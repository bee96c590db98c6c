"""Single behaviours of the scheduler, each in a few lines. Random schedules are in test_schedules.py."""

import itertools
import time

import pytest
from conservation import check
from ingot.engines.errors import EngineError
from ingot.runtime.kv import PagePool
from ingot.runtime.request import Request, RequestError, SamplingParams, State, fan_out
from ingot.runtime.scheduler import Scheduler

EOS = 99


def scheduler(pages=65, page_size=4, rows=4, budget=64, context=128, prefix_cache=True, **options):
    return Scheduler(PagePool(pages, page_size, prefix_cache), rows, budget, context, eos_token_ids=[EOS], **options)


def add(s, name, prompt, priority=0, **params):
    request = Request(name, list(prompt), SamplingParams(**{"max_tokens": 8, **params}), priority)
    s.add(request)
    return request


def shares(step):
    return {work.request.id: work.num_tokens for work in step}


def commit(s, step, token=7):
    return s.commit(step, [[token] * work.num_samples for work in step])


def run(s, token=7):
    """To the end, without overlap; the deltas."""
    deltas = []
    while step := s.schedule():
        deltas += commit(s, step, token)
        check(s)
    assert not s.has_work
    return deltas


def test_a_long_prompt_is_cut_to_the_budget_and_samples_at_its_end():
    s = scheduler(budget=10)
    request = add(s, "a", range(25), max_tokens=1)
    steps = [s.schedule() for _ in range(3)]  # three steps ahead of the host
    assert [(w.start, w.num_tokens, w.num_logits, w.num_samples, w.fresh) for (w,) in steps] == [
        (0, 10, 0, 0, True), (10, 10, 0, 0, False), (20, 5, 1, 1, False)
    ]  # fmt: skip
    assert steps[0][0].tokens == [*range(10)] and steps[2][0].kv_len == 25
    assert s.schedule() is None, "its one token is in flight"
    assert [commit(s, step) for step in steps] == [[], [], [("a", [7], None, "length", None, None)]]
    assert request.state is State.FINISHED and not s.has_work
    check(s)


def test_prompts_mix_with_decoding_and_do_not_stall_it():
    s = scheduler(budget=8)
    add(s, "urgent", range(100, 103), priority=1, max_tokens=40)
    commit(s, s.schedule())
    add(s, "long", range(30), priority=0)
    assert shares(s.schedule()) == {"urgent": 1, "long": 7}
    assert shares(s.schedule()) == {"long": 7, "urgent": 1}, "first in order, yet it leaves one token to the other"


def test_tokens_in_flight_come_from_the_device():
    s = scheduler()
    request = add(s, "a", [1, 2, 3])
    first, second, third = s.schedule(), s.schedule(), s.schedule()
    assert [work.tokens for (work,) in (first, second, third)] == [[1, 2, 3], [-1], [-1]]
    assert (request.length, request.num_in_flight, request.computed) == (6, 3, 5)
    commit(s, first, 11)
    assert second[0].tokens == [11] and request.output == [11]


def test_eos_wastes_one_row_and_no_more():
    s = scheduler()
    request = add(s, "a", [1, 2, 3])
    first, second = s.schedule(), s.schedule()
    (delta,) = commit(s, first, EOS)
    assert (delta.token_ids, delta.finish_reason, delta.stop_reason) == ([EOS], "stop", None)
    assert s.schedule() is None and request.row == 0 and request.pages, "held while a step in flight uses them"
    assert commit(s, second, 5) == [] and request.row == -1 and not request.pages
    assert request.output == [EOS] and not s.has_work


def test_stop_tokens_min_tokens_and_ignore_eos():
    s = scheduler()
    add(s, "stop", [1], stop_token_ids=[7])
    assert run(s)[-1] == ("stop", [7], None, "stop", 7, None)
    add(s, "min", [1], stop_token_ids=[7], min_tokens=3)
    assert len(run(s)) == 4, "the sampler masks stop tokens for three tokens; the fourth may stop"
    request = add(s, "ignore", [1], ignore_eos=True)
    assert run(s, EOS)[-1].finish_reason == "length" and request.output == [EOS] * 8
    assert request.stop_ids == frozenset()


def test_several_tokens_per_work_end_at_the_first_stop():
    """Drafts are to come: a work will sample several tokens."""
    s = scheduler()
    request = add(s, "a", [1, 2])
    (work,) = s.schedule()
    request.num_in_flight += 2
    (delta,) = s.commit((work._replace(num_samples=3),), [[5, EOS, 6]], [["x", "y", "z"]])
    assert (delta.token_ids, delta.logprobs, delta.finish_reason) == ([5, EOS], ["x", "y"], "stop")


def test_a_wrong_number_of_tokens_is_a_bug_that_shows():
    s = scheduler()
    add(s, "a", [1, 2])
    step = s.schedule()
    with pytest.raises(ValueError, match="0 tokens for a, of which 1"):
        s.commit(step, [[]])
    with pytest.raises(ValueError):
        s.commit(step, [])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_warm_prompt_computes_its_last_page_only(overlap):
    s = scheduler()
    add(s, "cold", range(16))
    if not overlap:
        run(s)
    else:
        s.schedule()
    warm = add(s, "warm", range(16))
    step = s.schedule()
    assert shares(step)["warm"] == 4 and warm.num_cached == 12, "at least one token is computed"
    stats = s.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (32, 12)


def test_n_answers_share_their_prompt_within_one_step():
    s = scheduler(rows=3)
    for request in fan_out("a", range(10), SamplingParams(n=3)):
        s.add(request)
    assert shares(s.schedule()) == {"a#0": 10, "a#1": 2, "a#2": 2}
    assert s.stats().num_held_pages == 3 + 1 + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_output_is_found_by_the_next_turn_of_a_conversation(overlap):
    s = scheduler()
    first = add(s, "a", range(6), max_tokens=7)
    steps = []
    while s.has_work:
        if step := s.schedule():
            steps.append(step)
        if not step or len(steps) > overlap:
            commit(s, steps.pop(0))
    turn = add(s, "b", [*first.tokens, 50, 51])
    s.schedule()
    assert turn.num_cached == 12, "13 tokens, the last without KV"


@pytest.mark.parametrize("other", [{"prefix_cache": False}, {"salt": b"tenant"}, {"prompt_logprobs": 1}])
def test_who_does_not_share(other):
    s = scheduler()
    add(s, "a", range(16))
    run(s)
    salt = other.pop("salt", b"")
    request = Request("b", list(range(16)), SamplingParams(**other), salt=salt)
    s.add(request)
    s.schedule()
    assert request.num_cached == 0


def test_priority_then_arrival():
    s = scheduler(rows=1)
    for name, priority in (("low", 5), ("first", 0), ("second", 0), ("urgent", -1)):
        add(s, name, [1], priority, max_tokens=1)
    assert [delta.request_id for delta in run(s)] == ["urgent", "first", "second", "low"]


def test_the_last_in_order_is_preempted_and_resumes_from_the_cache():
    s = scheduler(pages=9, page_size=2, rows=2)
    one = add(s, "one", [1, 2, 3, 4], max_tokens=10)
    two = add(s, "two", [5, 6, 7], max_tokens=8)
    outputs, cached = [], []
    while step := s.schedule():
        cached += [work.start for work in step if work.fresh and work.request is two]
        outputs += commit(s, step)
        check(s)
    assert one.num_preemptions == 0 and two.num_preemptions >= 1 == s.stats().num_preemptions
    assert len(one.output) == 10 and len(two.output) == 8, "nothing is lost and nothing is sampled twice"
    assert cached[0] == 0 < cached[1] and two.num_cached == 0, "what it computed is found; its own statistics stay"


def test_what_is_recomputed_can_be_found_again():
    s = scheduler(pages=6, page_size=2, rows=3)
    add(s, "one", [1, 2, 3, 4], max_tokens=7)  # fills the pool
    two = add(s, "two", [5, 6, 7], max_tokens=6)
    run(s)
    assert two.num_preemptions == 1 and s.stats().num_evictions >= 2
    three = add(s, "three", two.tokens)
    s.schedule()
    assert three.num_cached == 8


def test_preempted_in_flight_keeps_row_and_pages_until_the_commit():
    s = scheduler(pages=6, page_size=1, rows=2, prefix_cache=False)
    one, two = add(s, "one", [1, 2], max_tokens=4), add(s, "two", [3], max_tokens=4)
    first = s.schedule()
    second = s.schedule()  # pages: 3 and 2 of 5
    third = s.schedule()  # one wants a fourth
    assert third is None and two.state is State.PREEMPTED and two.row == 1 and len(two.pages) == 2
    commit(s, first)
    assert two.state is State.PREEMPTED and two.output == [7], "what was in flight is not lost"
    commit(s, second)
    assert two.state is State.WAITING and two.row == -1 and two.pages == [] and s.num_waiting == 1
    assert shares(s.schedule()) == {"one": 1}
    check(s)
    assert one.num_preemptions == 0


def test_one_request_fills_the_pool_and_ends():
    s = scheduler(pages=4, page_size=2)
    request = add(s, "a", [1, 2, 3], max_tokens=None)
    assert run(s)[-1][3:5] == ("length", "kv_pool") and len(request.tokens) == 7, "6 in the pool, the last without KV"


def test_the_context_ends_a_request():
    s = scheduler(context=6)
    request = add(s, "a", [1, 2, 3], max_tokens=None)
    assert run(s)[-1][3:5] == ("length", None) and len(request.tokens) == 6


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "prompt is empty"),
        (range(128), {}, "128 tokens; the context holds 128, at least one of them new"),
        (range(9), {"pages": 3}, r"9 tokens; the whole KV pool holds 8: shorten"),
    ],
)
def test_what_can_never_run_is_refused(prompt, options, message):
    s = scheduler(**options)
    with pytest.raises(RequestError, match=message):
        add(s, "a", prompt)
    assert not s.has_work


def test_odd_requests_are_refused():
    s = scheduler()
    add(s, "a", [1])
    with pytest.raises(RequestError, match="'a' is in use"):
        add(s, "a", [1])
    with pytest.raises(RequestError, match="priority is 'high'"):
        add(s, "b", [1], priority="high")
    with pytest.raises(EngineError, match="max_model_len is 1; one request needs at least 2"):
        scheduler(context=1)


def test_prompt_logprobs_score_each_position_once():
    s = scheduler(budget=4)
    add(s, "a", range(6), prompt_logprobs=1, max_tokens=2)
    works = []
    deltas = []
    while step := s.schedule():
        (work,) = step
        works.append((work.num_tokens, work.num_logits, work.num_samples))
        deltas += s.commit(step, [[7] * work.num_samples], None, [["s"] * (work.num_logits - work.num_samples)])
    assert works == [(4, 4, 0), (2, 2, 1), (1, 1, 1)]
    assert [(d.token_ids, d.prompt_logprobs) for d in deltas] == [([], ["s"] * 4), ([7], ["s"]), ([7], None)]


def test_prompt_logprobs_survive_a_preemption_in_the_middle():
    s = scheduler(pages=5, page_size=8, budget=2)
    add(s, "a", range(3), max_tokens=16)
    request = add(s, "b", range(50, 66), prompt_logprobs=1, max_tokens=1)
    scored = []
    while step := s.schedule():
        positions = [[*range(w.kv_len - w.num_logits, w.kv_len - w.num_samples)] for w in step]
        for delta in s.commit(step, [[7] * w.num_samples for w in step], None, positions):
            scored += delta.prompt_logprobs or [] if delta.request_id == "b" else []
    assert request.num_preemptions == 1 and scored == [*range(15)], "14 before it, one after"


def test_admission_leaves_a_page_in_hand_for_each_that_runs():
    s = scheduler(pages=5, page_size=2)  # 4 to give
    add(s, "a", range(2), max_tokens=4)
    add(s, "b", range(50, 56), max_tokens=1)
    step = s.schedule()
    assert shares(step) == {"a": 2}, "b would fit now, and be thrown out by a's next token"
    commit(s, step)
    assert [delta.request_id for delta in run(s)] == ["a", "a", "a", "b"] and s.stats().num_preemptions == 0


def test_cancel_and_finish():
    s = scheduler(rows=1)
    running, waiting = add(s, "a", [1, 2]), add(s, "b", [1, 2])
    step = s.schedule()
    assert s.cancel("b") == ("b", [], None, "abort", None, None) and waiting.state is State.FINISHED
    assert s.finish("a", "stop", "END")[3:5] == ("stop", "END") and running.pages, "a step in flight still uses them"
    assert s.finish("a") is None and s.cancel("never seen") is None
    add(s, "a", [3])  # the id is free again at once, the row is not
    assert s.schedule() is None
    assert commit(s, step) == [] and running.row == -1
    assert shares(s.schedule()) == {"a": 1}
    check(s)


def test_a_failed_step_ends_everything_and_leaves_the_scheduler_whole():
    s = scheduler(rows=2)
    for name in "abc":
        add(s, name, range(8))
    (work, _), _ = s.schedule(), s.schedule()
    s.cancel("a")
    assert {(delta.request_id, delta.finish_reason) for delta in s.abandon()} == {("b", "error"), ("c", "error")}
    check(s)
    assert not s.has_work and s.stats().num_held_pages == s.stats().num_cached_pages == 0
    assert len(work.pages) == 3, "whoever still reads the step finds what it was"
    again = add(s, "a", range(8))
    run(s)
    assert again.num_cached == 0, "KV of a failed step is not trusted"


def test_metrics_and_stats():
    ticks = itertools.count()
    s = scheduler(rows=1, clock=lambda: float(next(ticks)))
    a, b = add(s, "a", range(8), max_tokens=2), add(s, "b", [1])
    step = s.schedule()
    stats = s.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held_pages, stats.num_pages) == (1, 1, 2, 64)
    assert stats.kv_utilisation == 2 / 64
    commit(s, step)
    commit(s, s.schedule())
    assert a.metrics.first_scheduled < a.metrics.first_token < a.metrics.finished
    assert b.metrics.first_scheduled is None and s.num_waiting == 1


@pytest.mark.parametrize("rows, limit", [(32, 300e-6), (256, 2e-3)])
def test_speed(rows, limit):
    """Seconds of schedule() and of commit() with all rows decoding; the best of many, as the machine may be busy."""
    s = scheduler(pages=4096, page_size=16, rows=rows, budget=8192)
    for i in range(rows):
        add(s, str(i), range(i, i + 20), max_tokens=100)
    previous, best = s.schedule(), [1.0, 1.0]
    for _ in range(90):
        start = time.perf_counter()
        step = s.schedule()
        middle = time.perf_counter()
        commit(s, previous)
        best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
        previous = step
    assert len(previous) == rows and max(best) < limit
