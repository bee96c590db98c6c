"""Which server a request goes to: properties of the choice and of the memory behind it, without a socket."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.engines.errors import EngineError
from ingot.runtime.server.router.backends import TOKENS_PER_SEQUENCE, Backend, Fleet
from ingot.runtime.server.router.config import RouterConfig, url_of
from ingot.runtime.server.router.prefix import BLOCK, MAX_BLOCKS, Demand, PrefixMemory, demand_of, hashes

NOW = 100.0
texts = st.lists(st.sampled_from("ab"), max_size=6).map(lambda marks: b"".join(m.encode() * BLOCK for m in marks))


@st.composite
def fleets(draw):
    """Servers in any state, and a demand."""
    backends = [
        Backend(
            f"http://{i}",
            ready=draw(st.booleans()),
            num_sequences=draw(st.integers(0, 20)),
            num_tokens=draw(st.integers(0, 20000)),
            elsewhere=draw(st.integers(0, 3)),
            full_until=NOW + draw(st.sampled_from((-1, 1))),
        )
        for i in range(draw(st.integers(1, 5)))
    ]
    for backend in backends:
        for text in draw(st.lists(texts, max_size=3)):
            backend.prefixes.record(hashes(text))
    text = draw(texts)
    prefix = hashes(text)
    tried = draw(st.sets(st.sampled_from(backends), max_size=2)) if draw(st.booleans()) else ()
    return backends, Demand(1, len(text) // 4, prefix, prefix[0] if prefix else text), tried


@given(fleets(), st.sampled_from((0.0, 0.5, 4.0)))
def test_the_choice_is_ready_untried_and_within_the_margin(drawn, margin):
    backends, demand, tried = drawn
    chosen = Fleet(backends, margin).choose(demand, NOW, tried)
    ready = [b for b in backends if b.ready and b not in tried]
    free = [b for b in ready if b.full_until <= NOW]
    candidates = free or ([] if tried else ready)
    if not candidates:
        assert chosen is None
        return
    assert chosen in candidates
    assert chosen.work <= min(b.work for b in candidates) + margin + 1e-9
    known = chosen.prefixes.match(demand.prefix)
    for other in candidates:
        if other.work <= chosen.work:  # whoever has no more to do knows no more
            assert other.prefixes.match(demand.prefix) <= known
        if other.prefixes.match(demand.prefix) == known:
            assert chosen.work <= other.work


@given(fleets())
def test_the_choice_is_the_same_again(drawn):
    backends, demand, tried = drawn
    chosen = Fleet(backends, 4).choose(demand, NOW, tried)
    assert Fleet(backends[::-1], 4).choose(demand, NOW, tried) is chosen


def test_a_prefix_outweighs_work_by_what_it_saves():
    idle, busy = Backend("http://a", ready=True), Backend("http://b", ready=True, num_sequences=2)
    fleet = Fleet([idle, busy], margin=4)
    long, short = b"x" * (3 * TOKENS_PER_SEQUENCE * 4), b"x" * BLOCK
    busy.prefixes.record(hashes(long))
    assert fleet.choose(Demand(prefix=hashes(long)), NOW) is busy
    assert fleet.choose(Demand(prefix=hashes(short)), NOW) is idle
    busy.num_sequences = 5  # above the margin nothing helps
    assert fleet.choose(Demand(prefix=hashes(long)), NOW) is idle


def test_strangers_are_spread_and_a_loss_moves_only_its_own():
    fleet = Fleet([Backend(f"http://{i}", ready=True) for i in range(4)], 4)
    demands = [Demand(key=b"%d" % i) for i in range(400)]
    before = [fleet.choose(demand, NOW) for demand in demands]
    assert min(before.count(backend) for backend in fleet.backends) > 50
    lost = fleet.backends[0]
    lost.lose()
    after = [fleet.choose(demand, NOW) for demand in demands]
    assert all(new is old for new, old in zip(after, before, strict=True) if old is not lost) and lost not in after


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.booleans()), max_size=40))
def test_work_is_given_back(requests):
    fleet = Fleet([Backend(f"http://{i}") for i in range(4)], 4)
    for i, num_tokens, fails in requests:
        demand = Demand(2, num_tokens, hashes(b"x" * BLOCK))
        try:
            with fleet.sent(fleet.backends[i], demand):
                assert fleet.backends[i].work == 2 + num_tokens / TOKENS_PER_SEQUENCE
                if fails:
                    raise ValueError
        except ValueError:
            pass
    assert all(b.num_open == b.num_sequences == b.num_tokens == 0 for b in fleet.backends)
    assert sum(b.counts.requests for b in fleet.backends) == len(requests)


@given(st.lists(texts, max_size=30), texts, st.integers(1, 8))
def test_memory_is_bounded_and_finds_the_longest_prefix(seen, asked, size):
    memory = PrefixMemory(size)
    for text in seen:
        memory.record(hashes(text))
        assert len(memory) <= size
        assert memory.match(hashes(text)) == min(size, len(hashes(text)))
    prefix = hashes(asked)
    known = [block in memory._blocks for block in prefix]
    assert known == sorted(known, reverse=True)  # no block without those before it
    assert memory.match(prefix) == sum(known)


@given(texts, texts)
def test_hashes_agree_as_far_as_the_texts_do(one, other):
    same = 0
    while (
        same < min(len(one), len(other)) // BLOCK
        and one[: (same + 1) * BLOCK] == other[: (same + 1) * BLOCK]
    ):  # fmt: skip
        same += 1
    agree = [a == b for a, b in zip(hashes(one), hashes(other), strict=False)]
    assert sum(agree) == same and agree == sorted(agree, reverse=True)


def test_a_conversation_goes_on_with_the_hashes_it_had():
    turns = [{"role": "user", "content": "why? " * 200}, {"role": "assistant", "content": "because. " * 100}]
    first = demand_of(json.dumps({"model": "m", "messages": turns[:1], "tools": [{"x": 1}]}).encode())
    second = demand_of(json.dumps({"tools": [{"x": 1}], "messages": turns, "n": 3, "stream": True}).encode())
    assert len(first.prefix) >= 3 and second.prefix[: len(first.prefix)] == first.prefix and second.key == first.key
    assert (first.num_sequences, second.num_sequences) == (1, 3) and second.num_tokens > first.num_tokens > 200


@pytest.mark.parametrize(
    ("body", "sequences"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": [], "n": "many"}, 1),
        ({"prompt": {"a": 1}, "n": -4}, 1),
        ({"prompt": "a", "n": 10**30}, 1024),
        ([1], 1),
    ],
)
def test_sequences_are_counted(body, sequences):
    assert demand_of(json.dumps(body).encode()).num_sequences == sequences


@given(st.binary(max_size=60))
def test_any_body_is_a_demand(body):
    assert demand_of(body).num_sequences >= 1


def test_deep_and_long_bodies_cost_little():
    assert demand_of(b'{"prompt": ' + b"[" * 200_000) == Demand()
    demand = demand_of(json.dumps({"prompt": "x" * (1 << 20)}).encode())
    assert len(demand.prefix) == MAX_BLOCKS and demand.num_tokens > 200_000


def test_configuration_that_cannot_work_is_refused():
    assert url_of("host:80") == "http://host:80" and url_of("https://host/a/") == "https://host/a"
    assert RouterConfig(backends=("http://[::1]:8000", "https://host/under")).margin > 0
    for wrong in ((), ("http://",), ("ftp://host",), ("http://host:x",), ("http://a?b",), ("http://u:p@host",),
                  ("http://a", "http://a")):  # fmt: skip
        with pytest.raises(EngineError):
            RouterConfig(backends=wrong)
    for name in ("check_interval", "max_open", "margin", "port"):
        with pytest.raises(EngineError, match=name):
            RouterConfig(backends=("http://a",), **{name: -1})
