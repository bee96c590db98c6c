"""Speculative decoding: drafters guess tokens, one step of the engine verifies them, and control decides when it pays.

Exact by construction: the token of a position is sampled from the target's distribution with that position's own random
number, as without speculation, and drafts hold as long as they equal what was sampled. So an answer is the same
whatever is drafted (cf. Daliri et al., arXiv:2408.07978: "drafter-invariant"), and a guess d is accepted with
probability p(d), the most that any rule reaches for guesses that are not themselves random.

Reading order: tree.py, verify.py, drafter.py (ngram.py, suffix.py), draft_engine.py, costs.py, control.py.
"""
