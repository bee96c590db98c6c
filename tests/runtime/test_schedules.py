"""Random schedules against a fake executor that knows what every KV slot must hold.

The fake model's next token is a hash of the prefix, so what a request gets alone is known. The executor writes the hash
of the prefix to each slot, in step order, and checks every slot that a step reads: stale, overwritten or wrongly shared
pages cannot pass. Rows, pages, order, wasted work and progress are checked after every call. Where a world speculates,
drafts are right, wrong or none at random, and so is whether they are asked for at all.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from conservation import check
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ingot.runtime.kv import SCRATCH_PAGE, PagePool
from ingot.runtime.request import Request, RequestError, SamplingParams, State, fan_out
from ingot.runtime.scheduler import Scheduler
from ingot.runtime.speculation.statistics import SpeculationStats
from ingot.runtime.speculation.tree import Tree, depth_of, first, parents_of
from random_tree import path_to, random_parents

EOS, STOP, VOCABULARY, MOST_DRAFTS = 0, 1, 12, 5
BASES = [[2, 3, 4, 2, 3, 4, 5, 6] * 4, [2, 3, 4, 2, 3, 5, 5, 9] * 4, [7] * 32]  # prompts begin alike


@dataclass
class Record:
    """A request, what it gets alone (`tokens`, `kv`, made on demand) and what the outside saw of it."""

    request: Request
    tokens: list[int]
    kv: list[int] = field(default_factory=list)  # of each position: a hash of all tokens up to it
    seen: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    num_sampled: int = 0
    reason: str | None = None
    by_hand: bool = False

    def kv_at(self, position: int) -> int:
        while len(self.kv) <= position:
            before = self.kv[-1] if self.kv else int.from_bytes(self.request.salt, "little")
            self.kv.append(hash((before, self.token_at(len(self.kv)))))
        return self.kv[position]

    def token_at(self, position: int) -> int:
        while len(self.tokens) <= position:
            token = hash((self.kv_at(len(self.tokens) - 1), 1)) % VOCABULARY
            while (
                token in self.request.stop_ids and self.num_alone < self.request.params.min_tokens
            ):  # the sampler's mask
                token = (token + 1) % VOCABULARY
            self.tokens.append(token)
        return self.tokens[position]

    @property
    def num_alone(self) -> int:
        return len(self.tokens) - self.request.num_prompt

    def answer(self, most: int) -> tuple[list[int], str]:
        params, out = self.request.params, []
        stops = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))]
        while len(out) < most:
            out.append(self.token_at(self.request.num_prompt + len(out)))
            if out[-1] in stops and len(out) > params.min_tokens:
                return out, "stop"
        return out, "length"


class Follower:
    """A matcher of a grammar that allows everything, and knows how much of the answer it has seen."""

    def __init__(self):
        self.num_seen = 0

    def advance(self, token):
        self.num_seen += 1
        return False

    def fitting(self, drafts):
        return first(drafts, self.num_seen % 4)


class Guesses:
    """Speculation that comes and goes; what it drafts may be right."""

    def __init__(self, rng, records):
        self.rng, self.records, self.ahead, self.ended = rng, records, rng.random() < 0.5, set()
        self.on, self.right = rng.choice([0.3, 0.9, 1.0]), rng.choice([0.2, 0.7, 1.0])

    def plan(self, requests, coming):
        assert coming >= 0
        return self.rng.random() < self.on

    def propose(self, request, most):
        assert request.id not in self.ended and most >= 0
        if self.ahead:
            return first(request.drafts, most)
        return self.guess(request, len(request.tokens), min(most, self.rng.choice([0, 1, 3, MOST_DRAFTS])))

    def guess(self, request, length, num):
        record, lucky = self.records[request.id], [self.rng.random() < self.right for _ in range(num + 1)]
        if self.rng.random() < 0.5:
            return [(record.token_at(length + i) + (not lucky[i])) % VOCABULARY for i in range(num)]
        parents = random_parents(self.rng, num)
        shifts = [parents[:i].count(parent) - (lucky[parent] or -1) for i, parent in enumerate(parents)]  # by sibling
        right = [record.token_at(length + len(path_to(parents, i)) - 1) for i in range(num)]
        return Tree([(token + shift) % VOCABULARY for token, shift in zip(right, shifts, strict=True)], parents)

    def num_ahead(self, request, most):
        return max(0, min(most, self.rng.choice([0, 2, MOST_DRAFTS]))) if self.ahead else 0

    def observe(self, step, tokens, seconds):
        assert len(step) == len(tokens)

    def end(self, request):
        self.ended.add(request.id)

    def stats(self):
        return SpeculationStats()


class World:
    """A scheduler, a fake executor with up to `depth` steps ahead of the host, and the truth about each request."""

    def __init__(self, num_pages=9, page_size=2, rows=3, budget=8, context=24, depth=1, prefix_cache=True,
                 guessing=None):  # fmt: skip
        self.pool = PagePool(num_pages, page_size, prefix_cache)
        self.records: dict[str, Record] = {}
        self.guesses = guessing and Guesses(guessing, self.records)
        self.scheduler = Scheduler(self.pool, rows, budget, context, eos_token_ids=[EOS], speculation=self.guesses)
        self.depth = depth
        self.kv: dict[int, int] = {}  # slot -> hash of the prefix
        self.last_token: dict[int, int] = {}  # row -> token
        self.owner: dict[int, Request] = {}  # row -> request
        self.in_flight: list[tuple] = []  # (step, tokens, scored positions, slots), oldest first
        self.events: Counter[str] = Counter()

    def add(self, prompt, params, priority=0, salt=b"", bound=False):
        matcher = Follower if bound and not params.min_tokens else lambda: None
        for request in fan_out(f"r{len(self.records)}", prompt, params, priority, salt, matcher):
            try:
                self.scheduler.add(request)
            except RequestError:
                assert len(prompt) >= min(self.scheduler.max_model_len, self.pool.capacity + 1)
                return
            self.records[request.id] = Record(request, list(prompt))

    def end(self, name, reason):
        """From outside: a cancel, or a stop string."""
        record = self.records[name]
        self.events["ended in flight"] += record.reason is None and record.request.steps_in_flight > 0
        delta = self.scheduler.finish(name, reason)
        assert (delta is None) == (record.reason is not None)
        if delta:
            record.reason, record.by_hand = reason, True

    def schedule(self) -> bool:
        using = [r.request for r in self.records.values() if r.request.steps_in_flight]
        before = [(request.row, request.pages) for request in using]
        step = self.scheduler.schedule()
        assert all(r.row == row and r.pages is pages for r, (row, pages) in zip(using, before, strict=True)), (
            "given back"
        )
        if step is not None:
            self.launch(step)
        self.check()
        return step is not None

    def launch(self, step):
        assert step and sum(work.num_tokens for work in step) <= self.scheduler.max_num_batched_tokens
        assert len({work.row for work in step}) == len({work.request.id for work in step}) == len(step)
        assert not any(work.drafts for before, *_ in self.in_flight for work in before), "where it goes on is not known"
        written: dict[int, int] = {}
        for work in step:  # all writes come first
            record = self.records[work.request.id]
            if work.fresh:
                self.owner[work.row] = work.request
            assert self.owner[work.row] is work.request, "a row changed hands unannounced"
            if work.request.matcher:
                assert -1 not in work.tokens, "what may follow is not known"
                assert work.request.matcher.num_seen == work.request.num_output
                assert [*work.request.matcher.fitting(work.drafts)] == [*work.drafts], "the grammar refuses a draft"
                self.events["bound"] += 1
            tokens = [self.last_token[work.row] if token == -1 else token for token in work.tokens]
            assert len(tokens) == work.num_tokens > 0
            drafted, parents = work.kv_len - len(work.drafts), parents_of(work.drafts)
            for position, token in enumerate(tokens, work.start):
                slot = self.slot(work, position)
                if position < drafted:
                    assert token == record.token_at(position), "the executor would compute another token"
                assert slot // self.pool.page_size != SCRATCH_PAGE and slot not in written, "two tokens in one slot"
                if position < drafted:
                    written[slot] = record.kv_at(position)
                else:
                    parent = self.slot(work, drafted + parents[position - drafted])
                    written[slot] = hash((written[parent], token))
            assert not work.drafts or drafted == len(work.request.tokens)
            assert drafted + depth_of(work.drafts) < work.request.limit and work.kv_len <= self.scheduler.max_model_len
            assert len(work.pages) * self.pool.page_size >= work.kv_len + work.num_ahead, "no room for drafts"
        assert not any(slots & written.keys() for *_, slots in self.in_flight), "a slot in use is overwritten"
        self.kv |= written
        tokens, scored, slots, drafts = [], [], set(), []
        for work in step:
            record = self.records[work.request.id]
            read = [self.slot(work, position) for position in range(work.kv_len)]
            known = work.kv_len - len(work.drafts)
            assert [self.kv[slot] for slot in read[:known]] == record.kv[:known], "wrong KV"
            assert 0 <= work.num_samples <= work.num_logits <= work.num_tokens
            assert work.num_samples <= 1 if not work.drafts else work.num_samples == 1 + len(work.drafts)
            tokens.append([record.token_at(work.kv_len)] * (work.num_samples - len(work.drafts)))
            if work.drafts:
                tree = Tree(work.drafts, parents_of(work.drafts))
                path = tree.path([record.token_at(known + i) for i in range(depth_of(tree))])
                num_right = len(path)
                tokens[-1] = [record.token_at(known + i) for i in range(num_right + 1)]
                found = [self.kv[self.slot(work, known + node)] for node in path]
                assert found == [record.kv_at(known + i) for i in range(num_right)]
                self.kv |= {self.slot(work, known + i): kv for i, kv in enumerate(found)}  # as the executor moves it
                self.events["moved"] += path != [*range(num_right)]
                self.events += Counter(accepted=num_right, rejected=len(work.drafts) - num_right)
            drafts.append(self.guesses.guess(work.request, known + len(tokens[-1]), work.num_ahead)
                          if self.guesses else [])  # fmt: skip
            scored.append([*range(work.kv_len - work.num_logits, work.kv_len - work.num_samples)])
            slots.update(read)
            record.num_sampled += len(tokens[-1])
            if tokens[-1]:
                self.last_token[work.row] = tokens[-1][-1]
        self.in_flight.append((step, tokens, scored, drafts, slots))

    def slot(self, work, position):
        return work.pages[position // self.pool.page_size] * self.pool.page_size + position % self.pool.page_size

    def commit(self):
        step, tokens, scored, drafts, _ = self.in_flight.pop(0)
        logprobs = [[-token for token in some] for some in tokens]
        for delta in self.scheduler.commit(step, tokens, logprobs, scored, drafts):
            record = self.records[delta.request_id]
            assert record.reason is None, "a delta after the end"
            assert delta.token_ids or delta.prompt_logprobs, "an empty delta"
            assert list(delta.logprobs or []) == [-token for token in delta.token_ids]
            record.seen += delta.token_ids
            record.scored += delta.prompt_logprobs or []
            record.reason = delta.finish_reason
        self.check()

    def check(self):
        check(self.scheduler)
        assert self.scheduler.num_running <= self.scheduler.max_num_seqs
        for record in self.records.values():
            request = record.request
            works = [work for step, *_ in self.in_flight for work in step if work.request is request]
            assert request.steps_in_flight == len(works)
            assert request.num_in_flight == sum(work.num_samples for work in works)
            assert (request.state is State.FINISHED) == (record.reason is not None)
            assert works or not record.reason or (request.row == -1 and not request.pages), "an ended request holds"
            if not request.params.prefix_cache:
                others = [r.request.pages for r in self.records.values() if r is not record]
                assert not set(request.pages) & {page for pages in others for page in pages}, "opted out, yet shared"
            launched = [pair for step, tokens, *_ in self.in_flight for pair in zip(step, tokens, strict=True)]
            under_way = sum(len(some) for work, some in launched if work.request is request)
            wasted = record.num_sampled - under_way - len(record.seen)
            most = self.depth + (MOST_DRAFTS if self.guesses else 0)
            assert wasted <= (most + 1 if record.by_hand else most if record.reason == "stop" else 0)
            assert not (self.guesses and record.reason) or request.id in self.guesses.ended

    def turn(self):
        """As the loop does: one more step, then the oldest is committed."""
        scheduled = len(self.in_flight) <= self.depth and self.schedule()
        if len(self.in_flight) > self.depth or (self.in_flight and not scheduled):
            self.commit()
        elif not scheduled:
            assert not self.scheduler.has_work, "nothing runs and nothing is awaited: a deadlock"

    def finish(self):
        """Every request ends in bounded time with what it gets alone; then nothing is held."""
        left = 8 + 2 * sum(record.request.limit for record in self.records.values())
        while self.scheduler.has_work or self.in_flight:
            self.turn()
            left -= 1
            assert left, "starvation"
        for record in self.records.values():
            request = record.request
            longest = min(self.scheduler.max_model_len, self.pool.capacity + 1) - request.num_prompt
            answer, reason = record.answer(min(longest, request.params.max_tokens or longest))
            if record.by_hand:
                assert record.seen == answer[: len(record.seen)]
            else:
                assert (record.seen, record.reason) == (answer, reason)
            if not record.by_hand and request.params.prompt_logprobs is not None:
                assert record.scored == [*range(request.num_prompt - 1)], "each prompt position is scored once"
            self.events["kv_pool"] += request.stop_reason == "kv_pool"
        stats = self.scheduler.stats()
        assert stats.num_held_pages == stats.num_running == stats.num_waiting == 0
        self.events += Counter(preemptions=stats.num_preemptions, evictions=stats.num_evictions)
        self.events += Counter(hits=stats.prefix_hit_tokens, answers=len(self.records))


def random_prompt(rng):
    length = rng.choice([1, 2, 3, 4, 7, 8, 12, 17])
    return rng.choice(BASES)[:length] + [rng.randrange(2, VOCABULARY) for _ in range(rng.choice([0, 0, 1, 3]))]


def random_params(rng):
    min_tokens = rng.choice([0, 0, 0, 2, 5])
    return SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=rng.choice([None, min_tokens or 1, min_tokens + 2, min_tokens + 9]),
        min_tokens=min_tokens,
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=[STOP] if rng.random() < 0.2 else None,
        prompt_logprobs=0 if rng.random() < 0.15 else None,
        prefix_cache=rng.random() < 0.85,
    )


def random_world(rng, speculating):
    return World(
        num_pages=rng.choice([2, 4, 6, 9, 14, 40]),
        page_size=rng.choice([1, 2, 3, 4]),
        rows=rng.choice([1, 2, 3, 5]),
        budget=rng.choice([1, 2, 5, 8, 16, 64]),
        context=rng.choice([2, 9, 24, 40]),
        depth=rng.choice([0, 1, 1, 1, 2]),
        prefix_cache=rng.random() < 0.85,
        guessing=random.Random(rng.random()) if speculating else None,
    )


def random_schedule(rng, speculating) -> Counter[str]:
    world = random_world(rng, speculating)
    for _ in range(rng.randrange(4, 24)):
        for _ in range(rng.choice([0, 0, 1, 2])):
            salt = rng.choice([b"", b"", b"", b"other"])
            world.add(random_prompt(rng), random_params(rng), rng.choice([0, 0, 0, -1, 1]), salt, rng.random() < 0.3)
        if world.records and rng.random() < 0.15:
            world.end(rng.choice([*world.records]), rng.choice(["abort", "stop"]))
            world.check()
        world.turn()
    world.finish()
    return world.events


@pytest.mark.parametrize("speculating", [False, True])
def test_thousands_of_random_schedules(speculating):
    events: Counter[str] = Counter()
    for seed in range(2000):
        try:
            events += random_schedule(random.Random(seed), speculating)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    wanted = ["preemptions", "evictions", "hits", "kv_pool", "ended in flight", "bound"]
    wanted += ["accepted", "rejected", "moved"] if speculating else []
    assert min(events[e] for e in wanted) > 100, events


class Schedules(RuleBasedStateMachine):
    """The same world with hypothesis choosing, and shrinking, what happens; commits come in any rhythm."""

    @initialize(seed=st.integers(0, 1 << 20))
    def start(self, seed):
        self.world = random_world(random.Random(seed), seed % 2)

    @rule(rng=st.randoms(use_true_random=False), priority=st.integers(-1, 1), salt=st.sampled_from([b"", b"other"]))
    def add(self, rng, priority, salt):
        self.world.add(random_prompt(rng), random_params(rng), priority, salt, rng.random() < 0.3)

    @precondition(lambda self: self.world.records)
    @rule(which=st.integers(0, 1000), reason=st.sampled_from(["abort", "stop"]))
    def end(self, which, reason):
        names = [*self.world.records]
        self.world.end(names[which % len(names)], reason)

    @precondition(lambda self: len(self.world.in_flight) <= self.world.depth)
    @rule()
    def schedule(self):
        self.world.schedule()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def commit(self):
        self.world.commit()

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
