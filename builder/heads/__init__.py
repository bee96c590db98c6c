"""Heads that draft from the target's hidden states: EAGLE-1 (arXiv:2401.15077) and EAGLE-3 (arXiv:2503.01840).

A head is a small decoder of its own KV cache. At position t it reads what the target thought there (`features`) and the
token at t + 1, and guesses the token at t + 2; then it goes on from its own hidden state and its own guess.
Reading order: checkpoint.py (the published formats), module.py (what is computed), build.py (an engine of it),
training.py (a head for a target, from text).
"""
