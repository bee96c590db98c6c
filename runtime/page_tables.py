"""The page table of each request: what it finds in the prefix cache, how it grows, and what others may find of it.

Whoever schedules decides whose turn it is; here is only whether the pool has pages for it.
"""

from __future__ import annotations

from .kv import PagePool, extend_digests
from .request import Request


class PageTables:
    """Tables of at most `max_model_len` tokens over a pool. They are `Request.pages`; nothing is kept here."""

    def __init__(self, pool: PagePool, max_model_len: int):
        self.pool, self.max_model_len = pool, max_model_len

    def lacking(self, request: Request, num_tokens: int) -> int:
        """Pages that it needs besides those it has to hold so many tokens; below 1: none."""
        return -(-num_tokens // self.pool.page_size) - len(request.pages)

    def grow(self, request: Request, num_pages: int) -> None:
        request.pages += self.pool.allocate(num_pages)

    def reserve(self, request: Request, end: int, num: int) -> int:
        """Pages for up to `num` tokens from `end` on, as far as there are free ones; for how many there are."""
        num = min(num, self.max_model_len - end)
        if (lacking := self.lacking(request, end + num)) > 0:
            self.grow(request, min(lacking, self.pool.num_free))
        return max(0, min(num, len(request.pages) * self.pool.page_size - end))

    def begin(self, request: Request, spare: int) -> bool:
        """Pages for all its tokens, of which those found in the cache are computed. False, and none: too few are free,
        `spare` of them being for others."""
        pool = self.pool
        cached = pool.match(self._prefix(request))
        lacking = -(-len(request.tokens) // pool.page_size) - len(cached)
        if pool.num_free - pool.num_idle(cached) < lacking + spare:
            return False
        pool.hold(cached)
        request.pages = cached + pool.allocate(lacking)
        request.num_shared = len(cached)
        request.computed = len(cached) * pool.page_size
        return True

    def share(self, request: Request) -> None:
        """Lets others find its full pages of known tokens."""
        pool = self.pool
        full = min(request.computed, len(request.tokens)) // pool.page_size
        if full > request.num_shared and pool.prefix_cache and request.params.prefix_cache:
            extend_digests(request.digests, request.tokens, pool.page_size, full, request.salt)
            for i in range(request.num_shared, full):
                pool.share(request.pages[i], request.digests[i])
            request.num_shared = full

    def release(self, request: Request) -> None:
        """Gives all back; nothing of it is computed any more."""
        self.pool.release(request.pages)
        request.pages = []  # a new list: works in the caller's hands keep the old one
        request.computed = 0

    def _prefix(self, request: Request) -> list[bytes]:
        """Digests of the pages it may find in the cache: it computes at least one token, and all positions to score."""
        if not (self.pool.prefix_cache and request.params.prefix_cache):
            return []
        reach = len(request.tokens) - 1
        if request.params.prompt_logprobs is not None and request.num_scored < request.num_prompt - 1:
            reach = request.num_scored
        num_pages = reach // self.pool.page_size
        extend_digests(request.digests, request.tokens, self.pool.page_size, num_pages, request.salt)
        return request.digests[:num_pages]
