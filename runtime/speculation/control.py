"""When to speculate, and how many tokens to draft for whom: whatever makes most tokens a second, by what was measured.

A step's time follows from its tokens (`costs.py`), corrected by how long steps take with drafts and without. What a
draft gains follows from how often the request's drafts were right lately. While drafts are verified, nobody knows the
next token before the step is done, so all requests move together and the host's work is not hidden: that is in the
correction, too. With more requests a step's tokens cost more, and speculation ends; with fewer it comes back.

A tree of drafts is right more often than a chain, and costs more tokens: both are followed, and what pays better is
asked for. How a chain would have done is seen in a tree, too: its likeliest path is its beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from heapq import nlargest

from ..request import Request, State
from ..step import Step, Work
from .costs import Costs
from .drafter import Drafter
from .outlook import Chance, Median, Outlook
from .statistics import SpeculationStats
from .tree import Tree

HOPE = 0.7  # of a draft's token to be right, before anything is known
SPREAD = 0.7  # of a chain's failures that are a tree's, too, before that is known
WEIGHT, WEIGHT_OF_ALL = 8.0, 40.0  # tokens that a prior counts for: all requests' for one request, HOPE for all
MEMORY, MEMORY_OF_ALL = 0.95, 0.998  # what is left of a count after one token more
PAUSE = 8  # steps without speculation between two looks at whether it would pay
HORIZON = 32  # steps in which speculation has to earn what a draft engine must catch up with
TRIAL, LOOKS, WORTH = 8, 32, 0.6  # steps of a trial, after so many looks, where at least that speed is expected
TRIED = 16  # requests at most that a trial drafts for: all would tell no more, and take as long as ten steps
LASTING, MOST_PATIENCE = 64, 16  # steps with drafts that show that they pay; how much rarer tries get
WATCHED = 4  # requests of a step whose drafts are only looked at: looking all of them up took 4% at 64 requests
OVERHEAD = 1.1  # of steps that are not overlapped, before that is known
ADVANTAGE = 0.05  # that speculation must have to be turned on; without any it is turned off
SPREAD_OUT = 0.12  # besides, of many requests: those that are ahead end early, and leave the last ones in small steps
SURE = 0.1  # how much the latest step says about whether a drafter has an idea


class Speculation:
    """Used by the scheduler, in its thread. most: tokens drafted at a time; adapt=False: always so many.

    nodes: of a tree; 0: there are none.
    """

    def __init__(self, drafter: Drafter, most: int, costs: Costs, adapt: bool = True, nodes: int = 0):
        self._drafter, self._most, self._costs, self._adapt = drafter, most, costs, adapt
        self._on = not adapt
        self._outlooks: dict[Request, Outlook] = {}
        self._right, self._branched = (Chance(MEMORY_OF_ALL, WEIGHT_OF_ALL) for _ in range(2))
        self._nodes, self._tree = nodes, nodes > 0  # of the trees there may be; whether the next drafts are some
        self._pause = self._settling = self._looks = self._trial = self._spell = 0
        self._tried: Collection[Request] = ()  # who has drafts in the trial
        self._patience = 1
        self._prompts = 0  # their tokens in the latest step
        self._hits = 1.0 if drafter.ahead else 0.5  # how often it has an idea, of all requests
        self._plain: dict[int, Median] = {}  # logarithm of the number of requests -> measured / computed seconds
        self._drafting: dict[int, Median] = {}
        self._drafted_at, self._accepted_at = [0] * most, [0] * most
        self._num_drafts = self._num_steps = self._num_all_steps = 0

    # -- asked by the scheduler ----------------------------------------------------------------------------------------

    def plan(self, requests: Sequence[Request], coming: int = 0) -> bool:
        """Whether the next step of these running requests is to speculate; if so, all of them move together.

        coming: requests that wait and have room.
        """
        some = [request for request in requests if request.params.speculate]
        if not self._adapt:
            self._on = bool(some)
            return self._on
        if not some:
            return self._on and not requests  # whoever comes first goes on as the last one ended
        if not self._on:
            self._pause -= 1
            if self._pause > 0:
                return False
            self._pause, self._looks = PAUSE, self._looks + 1
            self._doubt(some)
            if self._looks >= LOOKS * self._patience and not self._prompts:  # what was measured at first may be wrong
                self._looks = 0
                self._trial, self._tried = TRIAL, set(nlargest(TRIED, some, key=_left))
        before, self._on = self._on, self._pays(len(requests) - len(some), some, coming)
        if before and not self._on:  # where it did not last, the next try is longer in coming
            self._patience = 1 if self._spell >= LASTING else min(MOST_PATIENCE, 2 * self._patience)
            self._spell = 0
        if self._on != before:
            self._settling = 2  # steps in flight, which are timed by the other rule
        return self._on

    def propose(self, request: Request, most: int) -> Sequence[int]:
        """Drafts for a request that is about to decode, at most so many."""
        if not self._may_draft(request):
            return ()
        most = most if isinstance(request.drafts, Tree) else min(most, self._outlook(request).number)
        drafts = self._drafter.propose(request, most)
        if not self._drafter.ahead:
            self._hit(request, bool(drafts))
        return drafts

    def num_ahead(self, request: Request, most: int) -> int:
        """Tokens that the executor is to draft for the step after the next, of which at most `most` can follow one
        another: the nodes of a tree, or fewer for a chain."""
        if not (self._drafter.ahead and self._may_draft(request)):
            return 0
        outlook = self._outlook(request)
        outlook.reached = len(request.tokens) + 1
        return self._nodes if self._tree and most > 0 else max(0, min(most, outlook.number))

    def observe(self, step: Step, tokens: Sequence[Sequence[int]], seconds: float) -> None:
        """A step was committed: the tokens of each work that hold, and how long it took."""
        self._prompts = sum(work.num_tokens for work in step if not _decodes(work))
        if not any(work.num_samples for work in step):
            return
        verified = False
        for i, (work, found) in enumerate(zip(step, tokens, strict=True)):
            if work.drafts:
                verified = True
                self._verified(work.request, work.drafts, found)
            elif found and i < WATCHED and not self._drafter.ahead and not self._on:
                self._watch(work.request, found[0])
        self._num_all_steps += 1
        self._num_steps += verified
        self._spell += verified
        self._trial = max(0, self._trial - self._on)
        if self._settling:
            self._settling -= 1
        elif all(_decodes(work) for work in step):
            self._time(step, verified, seconds)

    def end(self, request: Request) -> None:
        if self._outlooks.pop(request, None):
            self._drafter.end(request)

    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            self._num_drafts, sum(self._drafted_at), sum(self._accepted_at), tuple(self._drafted_at),
            tuple(self._accepted_at), self._num_steps, self._num_all_steps,
        )  # fmt: skip

    def _may_draft(self, request: Request) -> bool:
        return request.params.speculate and (not self._trial or request in self._tried)

    # -- what is known -------------------------------------------------------------------------------------------------

    def _outlook(self, request: Request) -> Outlook:
        found = self._outlooks.get(request)
        if found is None:
            chances = Chance(MEMORY, WEIGHT), Chance(MEMORY, WEIGHT)
            found = self._outlooks[request] = Outlook(*chances, self._hits, self._most)
        return found

    def _verified(self, request: Request, drafts: Sequence[int], found: Sequence[int]) -> None:
        self._num_drafts += 1
        right = num_right = len(found) - 1
        chain = len(drafts)  # the likeliest path
        for depth in drafts.depths if isinstance(drafts, Tree) else range(1, chain + 1):
            self._drafted_at[depth - 1] += 1
        for i in range(num_right):
            self._accepted_at[i] += 1
        if isinstance(drafts, Tree):
            parents, path = drafts.parents, drafts.path(found)
            tried = num_right + ((path[-1] if path else -1) in parents)
            outlook = self._outlooks.get(request)  # none any more where these drafts ended the request
            for chance in (self._branched, outlook.branched) if outlook else (self._branched,):
                chance.count(num_right, tried)
            chain = next((i for i, parent in enumerate(parents) if parent != i - 1), chain)
            right = next((i for i, node in enumerate(path) if node != i), right)
        self._learn(request, right, min(chain, right + 1))

    def _learn(self, request: Request, right: int, tried: int) -> None:
        if outlook := self._outlooks.get(request):
            outlook.right.count(right, tried)
        self._right.count(right, tried)

    def _hit(self, request: Request, hit: bool) -> None:
        outlook = self._outlook(request)
        outlook.hits += SURE * (hit - outlook.hits)
        self._hits += SURE / 10 * (hit - self._hits)

    def _watch(self, request: Request, token: int) -> None:
        """Without speculation: would the drafter, which costs next to nothing, have been right?"""
        if not request.params.speculate or request.state is State.FINISHED:
            return
        outlook = self._outlook(request)
        if outlook.shadow:
            right = outlook.shadow[0] == token
            self._learn(request, right, 1)
            outlook.shadow = outlook.shadow[1:] if right else ()
        elif len(request.tokens) % 4 == 0:  # not always: the look-up takes time; its tokens have the new one already
            outlook.shadow = self._drafter.propose(request, self._most)
            self._hit(request, bool(outlook.shadow))

    def _doubt(self, some: Sequence[Request]) -> None:
        """What was learnt while speculating is out of date, the more the longer ago that was."""
        if self._drafter.ahead:
            for outlook in map(self._outlook, some):
                for chance in outlook.right, outlook.branched:
                    chance.fade(1 - 0.1 / self._patience)
            for chance in self._right, self._branched:
                chance.fade(1 - 0.01 / self._patience)
        for key, factor in self._drafting.items():
            factor.value += 0.05 / self._patience * (OVERHEAD * self._factor(self._plain, key) - factor.value)

    # -- what it costs -------------------------------------------------------------------------------------------------

    def _pays(self, num_others: int, some: Sequence[Request], coming: int) -> bool:
        """Sets the number of drafts of each; False if the requests are better off with none.

        While prompts are computed, drafts are tokens more in steps that are long anyway, and a token saved is worth
        what it would take in the steps of all requests to come.
        """
        target, draft = self._costs.target, self._costs.draft
        num, prompts = num_others + len(some), self._prompts
        key = num.bit_length()
        if key not in self._plain:  # first what it has to be better than
            return False
        everyone = num + coming if prompts else num
        share = target(everyone) * num / everyone  # seconds of a step without drafts that are theirs
        factor = self._factor(self._drafting, key)
        plain = num / (self._factor(self._plain, key) * share)  # tokens a second
        outlooks = [self._outlook(request) for request in some]
        hope = self._right(HOPE)
        chances = [min(outlook.right(hope), 0.99) for outlook in outlooks]
        lag = 0.0
        if draft:
            behind = sum(len(r.tokens) - o.reached for r, o in zip(some, outlooks, strict=True))
            lag = draft(behind) / HORIZON if behind > 2 * self._most * len(some) else 0.0

        def seconds(size: float, nums: Sequence[int]) -> float:
            """Of a step with so many tokens besides those of prompts, behind which so many are drafted for each."""
            longer = target(prompts + size) - target(prompts + num)
            return factor * (share + longer + self._costs.drafting(nums, self._most) + lag)

        best, at = 0.0, 0
        reach = [outlook.hits for outlook in outlooks]
        gain, size, hits = float(num), float(num), sum(reach)
        for i in range(1, self._most + 1):
            reach = [r * c for r, c in zip(reach, chances, strict=True)]  # chance that the i-th is reached and right
            gain += sum(reach)
            size += hits
            if (speed := gain / seconds(size, [i] * len(some))) > best:
                best, at = speed, i
        if self._nodes:
            with_trees = self._tree_speed(num, outlooks, hope, seconds)
            self._tree, best = with_trees > best, max(with_trees, best)
        needed = 1.0 + SPREAD_OUT * (1 - 1 / num) + (0.0 if self._on else ADVANTAGE)
        if best < plain * (WORTH if self._trial else needed):
            self._trial = 0
            return False
        size = prompts + num + at * hits
        price = target(size + 1) - target(size)
        price += draft(len(some)) / len(some) if draft and not self._costs.at_once else 0.0
        least = min(1.0, best * factor * price)  # a token that is likelier earns more than the average
        for outlook, chance in zip(outlooks, chances, strict=True):
            outlook.number = self._most if least <= 0 else min(self._most, int(math.log(least) / math.log(chance)))
            if not outlook.number:
                outlook.right.fade(0.98)  # its drafts may be better some time, which nobody would see
        return self._tree or any(outlook.number for outlook in outlooks)

    def _tree_speed(
        self, num: int, outlooks: Sequence[Outlook], hope: float, seconds: Callable[[float, Sequence[int]], float]
    ) -> float:
        """Tokens a second where all of `outlooks` among `num` requests have trees; seconds: of a step (`_pays`)."""
        prior, gain = self._branched(1 - SPREAD * (1 - hope)), float(num)
        for outlook in outlooks:
            chance = outlook.branched(prior)
            gain += sum(chance**i for i in range(1, self._most + 1))
        nodes = [self._nodes] * len(outlooks)
        return gain / seconds(num + sum(nodes), nodes)

    def _time(self, step: Step, verified: bool, seconds: float) -> None:
        """Learns from a step in which all requests decode how much longer it takes than computed."""
        drafting = any(work.num_ahead for work in step)
        if drafting and not verified:  # the draft engine catches up
            return
        expected = self._costs.target(sum(work.num_tokens for work in step))
        expected += self._costs.drafting([work.num_ahead for work in step if work.num_ahead], self._most)
        corrections, key = self._drafting if self._on else self._plain, len(step).bit_length()
        if key not in corrections:
            corrections[key] = Median(self._factor(corrections, key))
        corrections[key].count(seconds / expected)

    def _factor(self, corrections: dict[int, Median], key: int) -> float:
        if found := corrections.get(key):
            return found.value
        return OVERHEAD * self._factor(self._plain, key) if corrections is self._drafting else 1.0


def _left(request: Request) -> int:
    """Tokens until its limit."""
    return request.limit - len(request.tokens)


def _decodes(work: Work) -> bool:
    return work.num_samples > 0 and work.num_tokens == 1 + len(work.drafts) and not work.fresh
