"""Deterministic evaluation: option log-probabilities, greedy answers, metrics and their intervals."""
