"""Drafts as a tree: several guesses for one place, verified in the same step (Miao et al., arXiv:2305.09781).

A tree is a sequence of tokens, each behind its parent; a plain sequence is a chain. Whoever reads a tree as a chain
loses guesses, never an answer. In the KV pages each node has a slot of its own, in the order of the sequence, and the
position of its depth; once verified, the path that holds moves to where a chain would lie. The likeliest path comes
first, so that it seldom has to.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property
from operator import lt

import numpy as np


class Tree(tuple[int, ...]):
    """Tokens; `parents` [n]: the place in it of what each follows, -1: the last token that is known.

    Raises ValueError: a parent that is not before its child, or two children with the same token.
    """

    parents: tuple[int, ...]

    def __new__(cls, tokens: Sequence[int], parents: Sequence[int]) -> Tree:
        tree = super().__new__(cls, tokens)
        tree.parents = tuple(parents)
        num = len(tree)
        behind = len(tree.parents) == num and all(map(lt, tree.parents, range(num)))
        if not behind or min(tree.parents, default=-1) < -1:
            raise ValueError(f"{list(parents)} are not the parents of {num} nodes")
        if len(set(zip(tree.parents, tree, strict=True))) < num:
            raise ValueError(f"two of {list(tokens)} under {list(parents)} are the same token in the same place")
        return tree

    @cached_property
    def depths(self) -> list[int]:
        """[n] from 1 on."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 + (found[parent] if parent >= 0 else 0))
        return found

    @property
    def paths(self) -> list[int]:
        """[n] what each node sees of them: bit i for node i."""
        found: list[int] = []
        for i, parent in enumerate(self.parents):
            found.append(1 << i | (found[parent] if parent >= 0 else 0))
        return found

    def ancestors(self) -> np.ndarray:
        """[n] int32 as `PagedAttention` reads them where these are the last keys of a sequence."""
        return bits(np.array(self.paths, np.uint64), len(self))

    def keep(self, wanted: Sequence[bool]) -> Tree:
        """The nodes that are wanted and whose ancestors are."""
        if all(wanted):
            return self
        place = {-1: -1}
        for i, (parent, want) in enumerate(zip(self.parents, wanted, strict=True)):
            if want and parent in place:
                place[i] = len(place) - 1
        kept = list(place)[1:]
        return Tree([self[i] for i in kept], [place[self.parents[i]] for i in kept])

    def up_to(self, node: int) -> list[int]:
        """The tokens from the first to that of `node`."""
        found: list[int] = []
        while node >= 0:
            found.append(self[node])
            node = self.parents[node]
        return found[::-1]

    def path(self, tokens: Sequence[int]) -> list[int]:
        """Nodes along the beginning of `tokens` that the tree has."""
        found: list[int] = []
        at, num = -1, len(tokens)
        for i, parent in enumerate(self.parents):  # children come behind their parents
            if parent == at and len(found) < num and self[i] == tokens[len(found)]:
                found.append(at := i)
        return found


def bits(paths: np.ndarray, num: int | np.ndarray) -> np.ndarray:
    """paths: bit i for node i of the last `num` keys -> int32 of the last 32: what is before the nodes is seen."""
    before, one = np.asarray(32 - num, np.uint64), np.uint64(1)
    return (paths << before | (one << before) - one).astype(np.uint32).view(np.int32)


def parents_of(drafts: Sequence[int]) -> Sequence[int]:
    return drafts.parents if isinstance(drafts, Tree) else range(-1, len(drafts) - 1)


def depth_of(drafts: Sequence[int]) -> int:
    """Drafts that follow one another at most."""
    return max(drafts.depths, default=0) if isinstance(drafts, Tree) else len(drafts)


def first(drafts: Sequence[int], num: int) -> Sequence[int]:
    """At most so many of them."""
    if num >= len(drafts):
        return drafts
    return Tree(drafts[:num], drafts.parents[:num]) if isinstance(drafts, Tree) else drafts[:num]


def no_deeper(drafts: Sequence[int], depth: int) -> Sequence[int]:
    """Those of which at most `depth` follow one another."""
    if isinstance(drafts, Tree):
        return drafts if depth_of(drafts) <= depth else drafts.keep([d <= depth for d in drafts.depths])
    return drafts[: max(0, depth)]


def likeliest(tokens: np.ndarray, parents: np.ndarray, chances: np.ndarray, num: int) -> list[Tree]:
    """The best trees of `num` nodes of each request's [S, n], each behind its parent; chances: logarithms, of whole
    paths.

    Its likeliest path, from the first step on, comes first, then the others by chance (EAGLE-2, arXiv:2406.16858).
    """
    best = np.argsort(-chances, axis=1, kind="stable")[:, :num]  # no node is likelier than its parent
    columns = (each.tolist() for each in (best, *(np.take_along_axis(part, best, 1) for part in (parents, tokens))))
    return [_path_first(list(zip(*each, strict=True))) for each in zip(*columns, strict=True)]


def _path_first(nodes: list[tuple[int, int, int]]) -> Tree:
    """nodes: number, that of the parent, token; by chance."""
    path: list[tuple[int, int, int]] = []
    others: list[tuple[int, int, int]] = []
    last = -1
    for node in nodes:
        if node[1] == last:
            path.append(node)
            last = node[0]
        else:
            others.append(node)
    path += others
    place = {-1: -1} | {number: at for at, (number, _, _) in enumerate(path)}
    return Tree([token for _, _, token in path], [place[parent] for _, parent, _ in path])


class Growth:
    """Trees of S requests that grow by depth: of each level the likeliest nodes, by the chances of their whole paths,
    are run, and what follows from them is the next level (EAGLE-2, arXiv:2406.16858).

    tokens, chances [S, n]: of the first level, and the logarithms of their chances.
    """

    def __init__(self, tokens: np.ndarray, chances: np.ndarray):
        self._begin = 0  # of the newest level among all nodes
        self._levels = [(tokens, np.full(tokens.shape, -1), chances)]

    def going_on(self, num: int) -> np.ndarray:
        """Which of the newest level are to be run, at most `num` of each request: their places in it [S, num]."""
        return np.argsort(-self._levels[-1][2], axis=1, kind="stable")[:, :num]

    def tokens(self, run: np.ndarray) -> np.ndarray:
        """[S, num] of these nodes of the newest level."""
        return np.take_along_axis(self._levels[-1][0], run, 1)

    def add(self, run: np.ndarray, tokens: np.ndarray, chances: np.ndarray) -> None:
        """The next level: what may follow each of the nodes that were run, tokens and chances [S, num, branches]."""
        before, (size, _, branches) = self._levels[-1], tokens.shape
        chances = np.take_along_axis(before[2], run, 1)[..., None] + chances
        parents = np.repeat(self._begin + run, branches, 1)
        self._begin += before[0].shape[1]
        self._levels.append((tokens.reshape(size, -1), parents, chances.reshape(size, -1)))

    def trees(self, num: int) -> list[Tree]:
        """The best of `num` nodes of each request."""
        tokens, parents, chances = (np.concatenate(part, 1) for part in zip(*self._levels, strict=True))
        return likeliest(tokens, parents, chances, num)


def product(tokens: np.ndarray, chances: np.ndarray, num: int) -> Tree:
    """The likeliest tree of `num` nodes where guesses do not depend on one another: tokens, logarithms of their chances
    [heads, branches], each head's in descending order (Medusa, arXiv:2401.10774)."""
    heap = [(-float(chances[0, 0]), 0, 0, -1)]  # minus the chance of the path, head, branch, parent
    found: list[tuple[int, int, float]] = []
    while heap and len(found) < num:
        minus, head, branch, parent = heapq.heappop(heap)
        node = len(found)
        found.append((int(tokens[head, branch]), parent, -minus))
        if branch + 1 < tokens.shape[1]:
            step = chances[head, branch] - chances[head, branch + 1]
            heapq.heappush(heap, (minus + float(step), head, branch + 1, parent))
        if head + 1 < len(tokens):
            heapq.heappush(heap, (minus - float(chances[head + 1, 0]), head + 1, 0, node))
    nodes, parents, paths = (np.array([column]) for column in zip(*found, strict=True))
    return likeliest(nodes, parents, paths, num)[0]
