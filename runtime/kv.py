"""The KV pool's pages: who holds which, and which full pages can be shared by their content.

A full page is named by a digest of its tokens and of all before them, so a chain of digests finds a prefix without
comparing tokens; at 128 bits (BLAKE2b) neither chance nor an adversary makes two prefixes meet.
A page is in exactly one state: held (references > 0), cached (nobody holds it, but its content can be found; the least
recently used goes first) or free. Page 0 belongs to nobody: padding tokens of a CUDA graph write there.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

from ..engines.errors import EngineError

SCRATCH_PAGE = 0


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], page_size: int, num_pages: int, salt: bytes = b""
) -> None:
    """Appends to the chain until it names the first `num_pages` full pages of `tokens`."""
    for i in range(len(digests), num_pages):
        parent = digests[i - 1] if i else salt
        page = array("q", tokens[i * page_size : (i + 1) * page_size])  # [page_size]
        # `person` keeps a first page (parent: the salt, any length) apart from a later one (parent: a digest)
        digests.append(blake2b(page.tobytes() + parent, digest_size=16, person=b"next" if i else b"first").digest())


class PagePool:
    """`num_pages` pages of `page_size` tokens, page 0 set aside. Plain bookkeeping: no memory is touched here.

    `on_evict(page, digest)` is called when a cached page is about to be given to someone else.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefix_cache: bool = True,
        on_evict: Callable[[int, bytes], None] | None = None,
    ):
        if num_pages < 2 or page_size < 1:
            raise EngineError(
                f"The KV pool has {num_pages} pages of {page_size} tokens; it needs at least 2 pages (one is scratch)"
                " of 1 token: give it more memory."
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.num_evictions = 0
        self._on_evict = on_evict
        self._references = [0] * num_pages
        self._digest: list[bytes | None] = [None] * num_pages
        self._page: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))  # a stack: the page freed last is the warmest
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def capacity(self) -> int:
        """Tokens that one request can hold when it has the pool to itself."""
        return (self.num_pages - 1) * self.page_size

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - 1 - self.num_free

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix of the chain. Nothing is held yet: see `hold`."""
        pages: list[int] = []
        for digest in digests:
            page = self._page.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds, and so would leave `num_free` if held."""
        return sum(not self._references[page] for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more reference to each page of a match."""
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
            self._references[page] += 1

    def allocate(self, num: int) -> list[int]:
        """`num` pages of any content, one reference each: free ones, then the least recently used cached ones."""
        assert num <= self.num_free, f"{num} pages asked for, {self.num_free} free: the caller must check"
        pages = []
        for _ in range(num):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, page: int, digest: bytes) -> None:
        """A held page is full and has this content: others may find it. Of two with one content, the first is found."""
        if self.prefix_cache and digest not in self._page and self._digest[page] is None:
            self._page[digest] = page
            self._digest[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference to each. Of a sequence's pages the last is reused first: beginnings are shared most."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                assert self._references[page] > 0, f"page {page} was released more often than held"
            elif self._digest[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def clear_cache(self) -> None:
        """Forgets every content (after a failed step the pages may hold anything); held pages stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._page.clear()
        self._digest = [None] * self.num_pages

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Asserts the invariants; `owners` are the page lists of everyone who holds pages. For tests."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & cached or free & held or cached & held), "a page is in two states"
        assert free | cached | held == set(range(1, self.num_pages)), "a page is lost, or scratch is in use"
        owned = Counter(page for pages in owners for page in pages)
        assert owned == {page: self._references[page] for page in held}, "references do not equal owners"
        assert {p: d for d, p in self._page.items()} == {p: d for p, d in enumerate(self._digest) if d}, "digests"
        assert cached <= set(self._page.values()), "a cached page has no content"
        assert not free & set(self._page.values()), "a free page can be found"

    def _forget(self, page: int) -> None:
        digest = self._digest[page]
        assert digest is not None
        if self._on_evict:
            self._on_evict(page, digest)
        del self._page[digest]
        self._digest[page] = None
        self.num_evictions += 1
