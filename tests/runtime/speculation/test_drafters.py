"""What n-gram and suffix lookup propose, against a plain search of the text."""

import random

import pytest
from ingot.runtime.request import Request, SamplingParams
from ingot.runtime.speculation.ngram import NgramDrafter
from ingot.runtime.speculation.suffix import DEPTH, SHORTEST, Followers, SuffixDrafter


def request(tokens, output=(), **options):
    found = Request("a", list(tokens), SamplingParams(), **options)
    found.tokens += output
    return found


def searched(tokens, shortest, longest, most):
    """What followed the longest n-gram at the end where it was seen last, over and over."""
    for n in range(longest, shortest - 1, -1):
        for at in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[at - n : at] == tokens[-n:]:
                grown = list(tokens)
                for i in range(most):
                    grown.append(grown[at + i])
                return grown[len(tokens) :]
    return []


@pytest.mark.parametrize("seed", range(20))
def test_ngrams_are_those_of_a_plain_search(seed):
    rng = random.Random(seed)
    shortest = rng.choice([1, 2, 3])
    longest = shortest + rng.choice([0, 1, 3])
    drafter, one = NgramDrafter(shortest, longest), request([rng.randrange(3)])
    for _ in range(60):
        most = rng.randrange(1, 6)
        assert list(drafter.propose(one, most)) == searched(one.tokens, shortest, longest, most), one.tokens
        one.tokens += [rng.randrange(3) for _ in range(rng.choice([1, 1, 2, 4]))]
    drafter.end(one)
    assert not drafter._indexes


def test_the_longest_known_context_decides():
    drafter = SuffixDrafter()
    one = request([1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3, 5, 1, 2, 3])
    assert list(drafter.propose(one, 1)) == [4], "1 2 3 was followed by 4, though 2 3 more often by 5"
    assert list(drafter.propose(request([9, 2, 3, 5, 9, 2, 3, 5, 9, 2, 3, 4, 8, 2, 3]), 3)) == [5, 9, 2]


def test_answers_of_the_session_are_looked_up():
    drafter = SuffixDrafter()
    first = request([7, 8], [1, 2, 3, 4, 5, 6])
    drafter.end(first)
    assert list(drafter.propose(request([9, 2, 3]), 4)) == [4, 5, 6]
    assert not drafter.propose(request([9, 2, 3], salt=b"other"), 4), "salts keep requests apart"
    drafter.end(request([7, 8, 6], [2, 3, 0]))
    apart = Request("b", [0], SamplingParams(prefix_cache=False))
    apart.tokens += [5, 5, 5, 8]
    drafter.end(apart)
    assert not drafter.propose(request([0, 5, 5]), 1), "whoever shares no prefixes shares no answers"
    assert drafter._answers[b""].best((7, 8))[1] == 1, "prompts are their requests' own"


def test_a_draft_ends_where_it_is_unlikely():
    drafter = SuffixDrafter()
    for token in range(12):
        drafter.end(request([0], [1, 2, 3, token, token, token]))
    assert list(drafter.propose(request([9, 1, 2]), 6)) == [3]


def test_memory_is_bounded():
    followers = Followers(most=500)
    rng = random.Random(0)
    tokens = [rng.randrange(1000) for _ in range(5000)]
    for at in range(0, 5000, 10):
        followers.learn(tokens, at, at + 10)
        assert len(followers._new) + len(followers._old) <= 2 * (500 + 10 * DEPTH)
    assert followers.best(tuple(tokens[-SHORTEST - 1 : -1]))[1] == tokens[-1], "what is new is known"
    assert followers.best(tuple(tokens[:SHORTEST])) is None, "what is old is forgotten"
