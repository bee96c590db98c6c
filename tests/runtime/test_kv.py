"""Pages are conserved, found by content and reused least recently used first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ingot.engines.errors import EngineError
from ingot.runtime.kv import PagePool, extend_digests


def digests_of(tokens, page_size, salt=b""):
    digests: list[bytes] = []
    extend_digests(digests, tokens, page_size, len(tokens) // page_size, salt)
    return digests


def fill(pool, tokens):
    """Holds pages for `tokens` and makes them findable."""
    digests = digests_of(tokens, pool.page_size)
    pages = pool.allocate(len(digests))
    for page, digest in zip(pages, digests, strict=True):
        pool.share(page, digest)
    return pages


def test_the_scratch_page_is_never_handed_out():
    pool = PagePool(5, 2)
    pages = pool.allocate(4)
    assert sorted(pages) == [1, 2, 3, 4] and pool.num_free == 0 and pool.capacity == 8
    pool.check([pages])


def test_too_small_a_pool_is_refused():
    with pytest.raises(EngineError, match="1 pages of 16 tokens; it needs at least 2"):
        PagePool(1, 16)


def test_released_content_is_found_until_it_is_evicted():
    evicted = []
    pool = PagePool(4, 2, on_evict=lambda page, digest: evicted.append(page))
    pages = fill(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.num_cached == 2 and pool.num_free == 3
    assert pool.match(digests_of([1, 2, 3, 4, 5, 6], 2)) == pages
    assert pool.match(digests_of([1, 2, 9, 9], 2)) == pages[:1]
    assert pool.match(digests_of([9, 9, 3, 4], 2)) == [], "a page is named by all tokens before it"
    other = pool.allocate(2)  # the free page, then the tail of the cached sequence
    assert other[1] == pages[1] and evicted == [pages[1]] and pool.num_evictions == 1
    assert pool.match(digests_of([1, 2, 3, 4], 2)) == pages[:1]
    pool.check([other])


def test_least_recently_used_goes_first():
    pool = PagePool(4, 1)
    a, b, c = ([*fill(pool, [t])] for t in (1, 2, 3))
    for pages in (a, b, c):
        pool.release(pages)
    pool.hold(a)  # used again
    pool.release(a)
    assert pool.allocate(3) == [*b, *c, *a]


def test_shared_pages_live_as_long_as_their_last_holder():
    pool = PagePool(3, 1)
    pages = fill(pool, [1])
    pool.hold(pages)
    pool.release(pages)
    assert pool.num_held == 1 and pool.num_idle(pages) == 0
    pool.check([pages])
    pool.release(pages)
    assert pool.num_held == 0 and pool.num_idle(pages) == 1
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages)


def test_of_two_pages_with_one_content_the_first_is_found():
    pool = PagePool(4, 1)
    first, second = fill(pool, [1]), fill(pool, [1])
    assert pool.match(digests_of([1], 1)) == first
    pool.release(second)
    assert pool.num_cached == 0
    pool.check([first])


def test_without_prefix_cache_nothing_is_found():
    pool = PagePool(4, 1, prefix_cache=False)
    pool.release(fill(pool, [1]))
    assert pool.match(digests_of([1], 1)) == [] and pool.num_cached == 0


def test_clear_cache():
    pool = PagePool(4, 1)
    held, gone = fill(pool, [1]), fill(pool, [2])
    pool.release(gone)
    pool.clear_cache()
    assert pool.match(digests_of([1], 1)) == pool.match(digests_of([2], 1)) == []
    pool.check([held])


def test_digests_depend_on_salt_position_and_every_token():
    chains = [digests_of(t, 2, s) for t, s in [([1, 2, 3, 4], b""), ([1, 2, 3, 4], b"x"), ([2, 1, 3, 4], b"")]]
    assert len({d for chain in chains for d in chain}) == 6
    one_page = digests_of([1, 2], 2, salt=chains[0][0])  # a salt that equals a parent digest is still another root
    assert one_page[0] != digests_of([9, 9, 1, 2], 2)[1] and digests_of([3, 4], 2, chains[0][0])[0] != chains[0][1]
    grown = digests_of([1, 2], 2)
    extend_digests(grown, [1, 2, 3, 4, 5], 2, 2)
    assert grown == chains[0]


class Pool(RuleBasedStateMachine):
    """Against a model: content of every page, by what its last holder wrote."""

    @initialize(num_pages=st.integers(2, 9))
    def start(self, num_pages):
        self.pool = PagePool(num_pages, 1)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def take(self, tokens):
        digests = digests_of(tokens, 1)
        found = self.pool.match(digests)
        assert [self.content[page] for page in found] == digests[: len(found)]
        lacking = len(digests) - len(found)
        if self.pool.num_free - self.pool.num_idle(found) < lacking:
            return
        self.pool.hold(found)
        new = self.pool.allocate(lacking)
        assert not any(page in pages for pages in self.held for page in new), "a held page was handed out"
        for page, digest in zip(new, digests[len(found) :], strict=True):
            self.content[page] = digest
            self.pool.share(page, digest)
        self.held.append(found + new)

    @rule(which=st.integers(0, 100))
    def give(self, which):
        if self.held:
            self.pool.release(self.held.pop(which % len(self.held)))

    @rule()
    def forget(self):
        self.pool.clear_cache()

    @invariant()
    def conserved(self):
        if hasattr(self, "pool"):
            self.pool.check(self.held)
            assert self.pool.num_held + self.pool.num_free == self.pool.num_pages - 1


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
